"""Will it fit: a traced step (`trace`, `plan`), a closed form (`estimate`), cards (`devices`), a probe on the card."""
