"""What every reader yields: one row as it stands in the file, or why it cannot be read."""

from __future__ import annotations

from typing import Any, NamedTuple


class Raw(NamedTuple):
    """origin: "file:line" or "file[index]". value: the row, None where it cannot be read: fault and text say why.

    copies: how often a training row stands in the mix, from its source's weight.
    """

    origin: str
    value: Any
    fault: str | None = None
    text: str | None = None
    copies: int = 1
