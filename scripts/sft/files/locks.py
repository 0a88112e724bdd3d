"""One process at a time: a lock that the system frees when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft.errors import RunError
from sft.files import door


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Holds `path` as a lock file for the time of the block; the system frees it if the process dies.

    Raises RunError with the holder's pid and start if another process has it.
    """
    door.make_folder(path.parent)
    with door.writing(path):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{what} is in use by another process ({file.read().strip() or 'unknown'})",
                where=str(path),
                mend="wait for it, or stop it: make pause",
            ) from None
        with door.writing(path):
            door.put(path, f"pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield


def locked(path: Path) -> bool:
    """Whether a living process holds this lock file."""
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
