"""The one door to the disk: every change that the kit makes goes through `disk`, and a refusal is said in one voice."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.errors import EnvironmentProblem, RunError, SftError

Content = str | bytes | Callable[[Path], object]  # a callable lets a library write the file, or files into the folder
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
}  # fmt: skip
_LIBRARY_REFUSAL = re.compile(
    r"PytorchStreamWriter|inline_container|iostream error|os error \d|IoError|No space left|Input/output error"
)


class Disk:
    """All that is asked of the system to change what is on the disk; fault tests put one in its place that fails."""

    def write(self, path: Path, content: Content) -> None:
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    def append(self, path: Path, text: str) -> None:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(text)

    def sync(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, path: Path, target: Path) -> None:
        os.replace(path, target)

    def swap(self, one: Path, other: Path) -> None:
        """Exchanges two names at once (renameat2, RENAME_EXCHANGE); OSError where the file system cannot."""
        library, here, exchange = ctypes.CDLL(None, use_errno=True), -100, 2
        if library.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def link(self, path: Path, target: str) -> None:
        path.symlink_to(target)

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


disk = Disk()


@contextmanager
def writing(target: Path, staged: Path | None = None) -> Iterator[None]:
    """Says a refusal of the disk as an EnvironmentProblem: what was to be written, how far it came, what is free."""
    try:
        yield
    except SftError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in REFUSALS or _LIBRARY_REFUSAL.search(str(error)):
            raise _refusal(error, number, target, staged) from error
        raise


def _refusal(error: Exception, number: int | None, target: Path, staged: Path | None) -> EnvironmentProblem:
    place = target.absolute()
    while not place.exists():
        place = place.parent
    why = os.strerror(number) if number else " ".join(str(error).split())[:120]
    far = f"more than {size(staged) / 2**20:,.1f} MiB are needed, " if staged else ""
    free = shutil.disk_usage(place).free / 2**20
    return EnvironmentProblem(
        f"{target.name} could not be written ({why}): {far}{free:,.1f} MiB are free there",
        where=str(target),
        fix="fix the folder's permissions" if number in (errno.EACCES, errno.EPERM) else "make room on that disk",
    )


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is none."""
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in every if one.is_file())


def put(path: Path, content: Content) -> None:
    """Writes `path` as it stands, into a staged folder, which says the disk's refusal; a callable writes it itself."""
    disk.write(path, content)


def append(path: Path, text: str) -> None:
    """Adds `text` to the end of `path`."""
    with writing(path):
        disk.append(path, text)


def sync(path: Path) -> None:
    """Asks the system to put a file or a folder on the disk."""
    with writing(path):
        disk.sync(path)


def rename(path: Path, target: Path) -> None:
    """Gives `path` another name and puts that on the disk."""
    with writing(target):
        disk.rename(path, target)
        disk.sync(target.parent)


def remove(path: Path) -> None:
    """Takes a file or a folder away, a folder at once: a crash never leaves half of it under its name."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            gone = beside(path, "gone")
            disk.rename(path, gone)
            path = gone
        disk.remove(path)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it."""
    with writing(path):
        disk.make_folder(path)


def beside(target: Path, ending: str) -> Path:
    """The hidden name next to `target` that this process uses while it works on it."""
    return target.with_name(f".{target.name}.{os.getpid()}.{ending}")


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
    put(folder / MANIFEST, _text(listed))


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


log = logging.getLogger("sft.files")
_LEFT_BEHIND = re.compile(r"\.(.+)\.(\d+)\.(part|old|gone)")


@contextmanager
def atomic_file(target: Path | str) -> Iterator[Path]:
    """Yields a path beside `target` to write to; on a clean exit it replaces `target`, on an error it is removed."""
    target = Path(target)
    staged = beside(target, "part")
    try:
        with writing(target, staged):
            disk.make_folder(target.parent)
            sweep(target.parent, target.name)
            yield staged
            disk.sync(staged)
            disk.rename(staged, target)
            disk.sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(staged)
        raise


def write_text(target: Path | str, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_file(target) as staged:
        disk.write(staged, text)


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
            disk.make_folder(staged)
            yield staged
            for path in sorted(staged.rglob("*")):
                disk.sync(path)
            disk.sync(staged)
            _take_place(staged, target, old)
            disk.sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(staged)
        raise
    for gone in (staged, old):
        if gone.exists():
            _remove_or_say(gone)


def _take_place(staged: Path, target: Path, old: Path) -> None:
    """Puts `staged` under the name `target`; what had the name before is then called `staged` or `old`."""
    if not target.exists():
        return disk.rename(staged, target)
    try:
        return disk.swap(staged, target)
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    disk.rename(target, old)
    try:
        disk.rename(staged, target)
    except OSError:
        disk.rename(old, target)
        raise
    return None


def _remove_or_say(path: Path) -> None:
    try:
        disk.remove(path)
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
            rename(path, folder / found[1])
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
        raise RunError(f"{link} is in the way: it should be a link", fix=f"move it away: mv {link} {link}.old")
    staged = beside(link, "part")
    with writing(link):
        disk.make_folder(link.parent)
        sweep(link.parent, link.name)
        try:
            disk.link(staged, os.path.relpath(target, link.parent))
            disk.rename(staged, link)
        except OSError:
            _remove_or_say(staged)
            raise
        disk.sync(link.parent)


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Holds `path` as a lock file for the time of the block; the system frees it if the process dies.

    Raises RunError with the holder's pid and start if another process has it.
    """
    make_folder(path.parent)
    with writing(path):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{what} is in use by another process ({file.read().strip() or 'unknown'})",
                where=str(path),
                fix="wait for it, or stop it: make pause",
            ) from None
        with writing(path):
            put(path, f"pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield


def locked(path: Path) -> bool:
    """Whether a living process holds this lock file."""
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
