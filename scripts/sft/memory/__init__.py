"""Will it fit: a closed form (`estimate`, `plan`), what cards have (`devices`), and a measurement (`probe`)."""
