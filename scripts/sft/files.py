"""Every write that must not be lost goes through here: atomic files and folders, hashes, locks.

A file is written beside its target, fsynced, renamed over it, and its folder fsynced: a reader, a crash or a full disk
sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.errors import RunError


@contextmanager
def atomic_file(target: Path | str) -> Iterator[Path]:
    """Yields a path beside `target` to write to; on a clean exit it replaces `target`, on an error it is removed."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield staged
        sync(staged)
        os.replace(staged, target)
        sync(target.parent)
    finally:
        staged.unlink(missing_ok=True)


def write_text(target: Path | str, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_file(target) as staged:
        staged.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `target` to fill; on a clean exit it takes the place of `target`.

    An old `target` is first moved aside, and comes back if the new one cannot take its place.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.part")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        for path in sorted(staged.rglob("*")):
            if path.is_file():
                sync(path)
        sync(staged)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(staged, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        sync(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Asks the system to put a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def point(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to `target`, replacing an older link at once; never a real folder."""
    if link.exists() and not link.is_symlink():
        raise RunError(f"{link} is in the way: it should be a link", mend=f"move it away: mv {link} {link}.old")
    link.parent.mkdir(parents=True, exist_ok=True)
    staged = link.with_name(f".{link.name}.{os.getpid()}.part")
    staged.unlink(missing_ok=True)
    staged.symlink_to(os.path.relpath(target, link.parent))
    os.replace(staged, link)


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Holds `path` as a lock file for the time of the block; the system frees it if the process dies.

    Raises RunError with the holder's pid and start if another process has it.
    """
    import fcntl
    import time

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{what} is in use by another process ({file.read().strip() or 'unknown'})",
                where=str(path),
                mend="wait for it, or stop it: make pause",
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 and size of every file in `folder` into its manifest.json; the last file to be written."""
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"files": listed}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def manifest_problem(folder: Path) -> str | None:
    """Why `folder` is not what its manifest says, or None: no manifest, a file missing, cut short or changed."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
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
