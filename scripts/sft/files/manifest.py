"""What a folder holds, by SHA-256, and why it is no longer so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sft.files import door

MANIFEST = "manifest.json"


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 and size of every file in `folder`, and the SHA-256 of that list, into its manifest.json.

    It is the last file to be written.
    """
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    door.put(folder / MANIFEST, _text(listed))


def _text(listed: Any) -> str:
    own = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return json.dumps({"files": listed, "sha256": own}, indent=2) + "\n"


def manifest_problem(folder: Path) -> str | None:
    """Why `folder` is not what its manifest says, or None: no manifest, a file missing, cut short or changed."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        listed = json.loads(text)["files"]
        if text != _text(listed):
            return f"{MANIFEST} is not as it was written"
        for name, said in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != said["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {said['bytes']}"
            if sha256(path) != said["sha256"]:
                return f"{name} has changed since it was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None if listed else f"{MANIFEST} lists no file"
