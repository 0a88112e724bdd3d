"""Files that are compressed: gzip, and zstd (whose reader pyarrow brings along)."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

SUFFIXES = (".gz", ".zst")
BROKEN = (OSError, EOFError, zlib.error)  # what reading a compressed file that is cut or damaged raises


def open_bytes(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """The content of `path`, unpacked where it is packed, and the file under it, whose `tell` shows the progress."""
    raw = path.open("rb")
    head = raw.read(4)
    raw.seek(0)
    if head[:2] == b"\x1f\x8b":
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw))), raw
    if head == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")), raw
    return raw, raw


def plain_name(path: Path) -> Path:
    """`rows.jsonl.gz` -> `rows.jsonl`."""
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
