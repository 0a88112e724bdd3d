"""Files of JSON lines that people name on the command line: read whole, each fault with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.errors import DataError


def text_of(path: Path, what: str) -> str:
    """The text of a file, without a byte-order mark. what: as in "predictions file". Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no such {what}", where=str(path), mend="name another: see --help") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the {what} cannot be read: {error}", where=str(path)) from None


def rows(text: str, path: Path, shape: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row with its `file:line`; blank lines do not count. shape: what a row looks like. Raises DataError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError("this line is not JSON", where=where, mend=shape) from None
        if not isinstance(row, dict):
            raise DataError("this line is not a JSON object", where=where, mend=shape)
        yield row, where
