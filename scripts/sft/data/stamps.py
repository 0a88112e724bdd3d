"""`source.json` beside styled rows: which file each was made from, with which content, by which style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft import files

NAME = "source.json"


def note(target: Path, source: Path, digest: str, **how: str) -> None:
    """Writes beside `target` that it was made from `source`, whose bytes had the SHA-256 `digest`."""
    entry = {"source": source.name, "sha256": digest, **how}
    files.write_json(target.parent / NAME, {"files": {**read(target.parent), target.name: entry}})


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its entry; nothing where there is no source.json or it cannot be read."""
    entries = files.read_json(folder / NAME).get("files")
    known = entries.items() if isinstance(entries, dict) else ()
    return {name: entry for name, entry in known if isinstance(entry, dict)}
