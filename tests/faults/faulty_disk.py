"""A disk whose Nth call fails or kills the process, after writing half of the data."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

from sft.files import Content, Disk

KINDS = ("kill", "ENOSPC", "EIO", "full")


class FaultyDisk(Disk):
    """Counts its calls and injects the fault `kind` into the Nth; `calls` lists them all. nth 0: only counts.

    full: ENOSPC at the Nth call and at every later one that needs space.
    """

    def __init__(self, nth: int, kind: str) -> None:
        self.nth, self.kind, self.calls = nth, kind, []  # type: ignore[var-annotated]

    def _inject(self, what: str, path: Path, half: Callable[[], object] = lambda: None) -> None:
        self.calls.append(f"{what} {path.name}")
        full = self.kind == "full" and 0 < self.nth < len(self.calls)
        if len(self.calls) != self.nth and not full:
            return
        if full and what in ("remove", "rename"):
            return
        half()
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if self.kind == "full" else getattr(errno, self.kind)
        raise OSError(number, os.strerror(number), str(path))

    def write(self, path: Path, content: Content) -> None:
        def half() -> None:
            before = set(path.rglob("*")) if path.is_dir() else set()
            super(FaultyDisk, self).write(path, content)
            new = sorted({*path.rglob("*")} - before) if path.is_dir() else [path]
            for whole in new[len(new) // 2 + 1 :]:
                whole.unlink()
            torn = new[len(new) // 2]
            os.truncate(torn, torn.stat().st_size // 2)

        self._inject("write", path, half)
        super().write(path, content)

    def append(self, path: Path, text: str) -> None:
        self._inject("append", path, lambda: super(FaultyDisk, self).append(path, text[: len(text) // 2]))
        super().append(path, text)

    def sync(self, path: Path) -> None:
        self._inject("sync", path)
        super().sync(path)

    def rename(self, path: Path, target: Path) -> None:
        self._inject("rename", target)
        super().rename(path, target)

    def swap(self, one: Path, other: Path) -> None:
        self._inject("swap", other)
        super().swap(one, other)

    def make_folder(self, path: Path) -> None:
        self._inject("make_folder", path)
        super().make_folder(path)

    def link(self, path: Path, target: str) -> None:
        self._inject("link", path)
        super().link(path, target)

    def remove(self, path: Path) -> None:
        def half() -> None:
            inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else []
            for one in inside[: len(inside) // 2]:
                one.unlink()

        self._inject("remove", path, half)
        super().remove(path)
