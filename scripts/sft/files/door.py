"""The one door to the disk: every change that the kit makes goes through `disk`, and a refusal is said in one voice."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sft.errors import EnvironmentProblem, SftError

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
        mend="mend the folder's permissions" if number in (errno.EACCES, errno.EPERM) else "make room on that disk",
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
