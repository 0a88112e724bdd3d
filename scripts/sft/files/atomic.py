"""Files and folders that are whole or not there: written aside, synced, put in place at once; links likewise."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.errors import RunError
from sft.files import door
from sft.files.door import beside, writing
from sft.files.manifest import manifest_problem

log = logging.getLogger("sft.files")
_LEFT_BEHIND = re.compile(r"\.(.+)\.(\d+)\.(part|old|gone)")


@contextmanager
def atomic_file(target: Path | str) -> Iterator[Path]:
    """Yields a path beside `target` to write to; on a clean exit it replaces `target`, on an error it is removed."""
    target = Path(target)
    staged = beside(target, "part")
    try:
        with writing(target, staged):
            door.disk.make_folder(target.parent)
            sweep(target.parent, target.name)
            yield staged
            door.disk.sync(staged)
            door.disk.rename(staged, target)
            door.disk.sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            door.disk.remove(staged)
        raise


def write_text(target: Path | str, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_file(target) as staged:
        door.disk.write(staged, text)


def write_json(target: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `target` to fill; on a clean exit it takes the place of `target` at once."""
    target = Path(target)
    staged, old = beside(target, "part"), beside(target, "old")
    try:
        with writing(target, staged):
            sweep(target.parent, target.name)
            door.disk.make_folder(staged)
            yield staged
            for path in sorted(staged.rglob("*")):
                door.disk.sync(path)
            door.disk.sync(staged)
            _take_place(staged, target, old)
            door.disk.sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            door.disk.remove(staged)
        raise
    for gone in (staged, old):
        if gone.exists():
            _remove_or_say(gone)


def _take_place(staged: Path, target: Path, old: Path) -> None:
    """Puts `staged` under the name `target`; what had the name before is then called `staged` or `old`."""
    if not target.exists():
        return door.disk.rename(staged, target)
    try:
        return door.disk.swap(staged, target)
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    door.disk.rename(target, old)
    try:
        door.disk.rename(staged, target)
    except OSError:
        door.disk.rename(old, target)
        raise
    return None


def _remove_or_say(path: Path) -> None:
    try:
        door.disk.remove(path)
    except OSError as error:
        log.warning("%s could not be removed (%s): it may be deleted by hand", path, error.strerror)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what killed commands left half-written in `folder`, and puts back what they had moved aside.

    name: of the one target to look for. What belongs to a living process stays.
    """
    for path in sorted(folder.glob(".*")):
        found = _LEFT_BEHIND.fullmatch(path.name)
        if not found or name not in (None, found[1]) or _alive(int(found[2])):
            continue
        if found[3] == "old" and path.is_dir() and not (folder / found[1]).exists() and not manifest_problem(path):
            door.rename(path, folder / found[1])
        else:
            _remove_or_say(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return pid != os.getpid()


def point(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to `target`, replacing an older link at once; never a real folder."""
    if link.exists() and not link.is_symlink():
        raise RunError(f"{link} is in the way: it should be a link", mend=f"move it away: mv {link} {link}.old")
    staged = beside(link, "part")
    with writing(link):
        door.disk.make_folder(link.parent)
        sweep(link.parent, link.name)
        try:
            door.disk.link(staged, os.path.relpath(target, link.parent))
            door.disk.rename(staged, link)
        except OSError:
            _remove_or_say(staged)
            raise
        door.disk.sync(link.parent)
