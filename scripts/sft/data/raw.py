"""What every reader yields: one row as it stands in the file, or why it cannot be read."""

from __future__ import annotations

from typing import Any, NamedTuple


class Raw(NamedTuple):
    """origin: "file:line" or "file[index]". value: the row, None where it cannot be read: fault and text say why."""

    origin: str
    value: Any
    fault: str | None = None
    text: str | None = None
