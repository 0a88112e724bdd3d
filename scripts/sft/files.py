"""Everything that the kit changes on the disk: atomic writes, manifests, locks, free space.

Every change goes through `disk`, which fault tests replace; a full or read-only disk becomes an EnvironmentProblem.
"""

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
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sft.errors import EnvironmentProblem, RunError, SftError, one_line

Content = str | bytes | Callable[[Path], object]  # a callable lets a library write the file, or files into the folder
MANIFEST = "manifest.json"
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
}  # fmt: skip
_LIBRARY_DISK_ERROR = re.compile(
    r"PytorchStreamWriter|inline_container|iostream error|os error \d|IoError|No space left|Input/output error"
)
_LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.(part|old|gone)")

log = logging.getLogger("sft.files")


class Disk:
    """The system calls that change the disk."""

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
        """Exchanges two names atomically (renameat2, RENAME_EXCHANGE); OSError where the file system cannot."""
        library, at_working_dir, exchange = ctypes.CDLL(None, use_errno=True), -100, 2
        if library.renameat2(at_working_dir, os.fsencode(one), at_working_dir, os.fsencode(other), exchange):
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
    """Turns a disk error inside the block, Python's or a library's, into an EnvironmentProblem about `target`.

    staged: the file or folder being written, whose size tells how much space is needed at least.
    """
    try:
        yield
    except SftError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in DISK_ERRORS and not _LIBRARY_DISK_ERROR.search(str(error)):
            raise
        reason = os.strerror(number) if number else one_line(error, 120)
        needed = f"more than {size(staged) / 2**20:,.1f} MiB are needed, " if staged else ""
        permission = number in (errno.EACCES, errno.EPERM)
        what = f"{target.name} could not be written ({reason}): {needed}{free_bytes(target) / 2**20:,.1f} MiB are free"
        fix = "fix the folder's permissions" if permission else "free space on that disk"
        raise EnvironmentProblem(what, where=str(target), fix=fix) from error


def put(path: Path, content: Content) -> None:
    """Writes `path` directly, for files inside a staged folder; a callable writes it itself."""
    disk.write(path, content)


def append(path: Path, text: str) -> None:
    """Adds `text` to the end of `path`."""
    with writing(path):
        disk.append(path, text)


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    with writing(path):
        disk.sync(path)


def rename(path: Path, target: Path) -> None:
    """Renames `path` and flushes the new name to the disk."""
    with writing(target):
        disk.rename(path, target)
        disk.sync(target.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder; a folder is renamed first, so that a crash never leaves half of it under its name."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            renamed = beside(path, "gone")
            disk.rename(path, renamed)
            path = renamed
        disk.remove(path)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents."""
    with writing(path):
        disk.make_folder(path)


def beside(target: Path, ending: str) -> Path:
    """The hidden name next to `target` that this process works under: ending `part`, `old` or `gone`."""
    return target.with_name(f".{target.name}.{os.getpid()}.{ending}")


# --- atomic writes


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yields the hidden name to write `target` under, free of leftovers; what is there on an error is removed."""
    staged = beside(target, "part")
    try:
        with writing(target, staged):
            disk.make_folder(target.parent)
            sweep(target.parent, target.name)
            yield staged
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(staged)
        raise


@contextmanager
def atomic_file(target: Path | str) -> Iterator[Path]:
    """Yields a path beside `target` to write to; it replaces `target` on a clean exit and is removed on an error."""
    target = Path(target)
    with _staging(target) as staged:
        yield staged
        disk.sync(staged)
        disk.rename(staged, target)
        disk.sync(target.parent)


def write_text(target: Path | str, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_file(target) as staged:
        disk.write(staged, text)


def write_json(target: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `target` to fill; on a clean exit it replaces `target` atomically."""
    target = Path(target)
    old = beside(target, "old")
    with _staging(target) as staged:
        disk.make_folder(staged)
        yield staged
        for path in (*sorted(staged.rglob("*")), staged):
            disk.sync(path)
        _replace_folder(staged, target, old)
        disk.sync(target.parent)
    for path in (staged, old):
        if path.exists():
            _try_remove(path)


def _replace_folder(staged: Path, target: Path, old: Path) -> None:
    """Renames `staged` to `target`; what had that name before is then called `staged` or `old`."""
    if target.exists():
        try:
            return disk.swap(staged, target)
        except (OSError, AttributeError) as error:  # a file system, or a C library, without an exchange of names
            if getattr(error, "errno", errno.ENOSYS) not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        disk.rename(target, old)
    try:
        disk.rename(staged, target)
    except OSError:
        if old.exists():
            disk.rename(old, target)
        raise
    return None


def _try_remove(path: Path) -> None:
    try:
        disk.remove(path)
    except OSError as error:
        log.warning("%s could not be removed (%s): delete it by hand", path, error.strerror)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left half-written in `folder`, and restores what they had moved aside.

    name: the only target to look for. Files of a living process stay.
    """
    for path in sorted(folder.glob(".*")):
        leftover = _LEFTOVER.fullmatch(path.name)
        if not leftover or name not in (None, leftover[1]) or _is_other_process(int(leftover[2])):
            continue
        target = folder / leftover[1]
        if leftover[3] == "old" and path.is_dir() and not target.exists() and not manifest_problem(path):
            rename(path, target)
        else:
            _try_remove(path)


def _is_other_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return pid != os.getpid()


def point(link: Path, target: Path) -> None:
    """Makes `link` a relative symbolic link to `target`, replacing an older link atomically; never a real folder."""
    if link.exists() and not link.is_symlink():
        raise RunError(f"{link} is not a symbolic link", fix=f"move it away: mv {link} {link}.old")
    with _staging(link) as staged:
        disk.link(staged, os.path.relpath(target, link.parent))
        disk.rename(staged, link)
        disk.sync(link.parent)


# --- manifests


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 and size of every file in `folder`, and the SHA-256 of that list, into its manifest.json.

    The manifest is the last file written: a folder without one is incomplete.
    """
    entries = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    put(folder / MANIFEST, _manifest_text(entries))


def _manifest_text(entries: Any) -> str:
    own = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": own}, indent=2) + "\n"


def manifest_problem(folder: Path, *, hashes: bool = True) -> str | None:
    """How `folder` differs from its manifest (a file missing or changed, no manifest); None if it does not.

    hashes: False compares only names and sizes, right after the manifest was written.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        entries = json.loads(text)["files"]
        if text != _manifest_text(entries):
            return f"{MANIFEST} has changed since it was written"
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if hashes and sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None if entries else f"{MANIFEST} lists no file"


# --- locks: of the open file description, so that they can be tested without being taken


_WRITE_LOCK = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's `struct flock`, the whole file


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Holds `path` as a lock file during the block; the system frees it if the process dies.

    Raises RunError with the holder's pid and start if another process has it.
    """
    make_folder(path.parent)
    with writing(path):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            take_lock(file)
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


def take_lock(file: IO[Any]) -> None:
    """Locks an open file until it, and every copy that a child process has inherited, is closed.

    Raises BlockingIOError if it is locked.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _WRITE_LOCK)


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock file; looking never takes the lock, so that it disturbs no one."""
    with open(path, encoding="utf-8") as file:
        holder = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _WRITE_LOCK)
    return bool(struct.unpack("hhqqi", holder)[0] != fcntl.F_UNLCK)


# --- sizes and free space


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if there is none."""
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in paths if each.is_file())


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds, or would hold, `path`."""
    return shutil.disk_usage(existing(path)).free


def require_free(path: Path, needed: int, what: str, *, fix: str, items: str = "") -> None:
    """Raises EnvironmentProblem if the disk of `path` has fewer than `needed` bytes free.

    what: what needs them. items: what they consist of, for the message.
    """
    free = free_bytes(path)
    if needed > free:
        shown = f" ({items})" if items else ""
        message = f"{what} needs about {format_bytes(needed)} on that disk, {format_bytes(free)} are free{shown}"
        raise EnvironmentProblem(message, where=str(existing(path)), fix=fix)


def format_bytes(count: int) -> str:
    """Bytes as MiB, or as GiB from one on."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
