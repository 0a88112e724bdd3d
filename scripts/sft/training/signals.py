"""Stopping at a step boundary: Ctrl-C, SIGTERM, a closed terminal, and the files `pause` and `save` in a run's folder.

The first signal takes effect after the current step; a second Ctrl-C stops at once. A signal that was ignored when the
command started (nohup) stays ignored.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sft.runs import PAUSE, SAVE

log = logging.getLogger("sft.training")
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}


class SignalHandler:
    """Notes requests to stop or save while its `with` block runs. `exit_code` is None until a stop is requested.

    agree: makes all ranks use the largest value that any of them has (the identity with one process).
    """

    def __init__(self, folder: Path, agree: Callable[[Sequence[int]], list[int]] = list) -> None:
        self.folder, self.agree = folder, agree
        self.exit_code: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        (self.folder / PAUSE).unlink(missing_ok=True)
        (self.folder / SAVE).unlink(missing_ok=True)
        for number in EXIT_CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.exit_code is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        if number == signal.SIGHUP:
            _detach_from_terminal()
        log.warning("stopping after this step, with a checkpoint (Ctrl-C again stops at once)")

    def poll(self) -> tuple[bool, bool]:
        """(stop, save): what is requested now, the same on every rank. Removes the file that requested it."""
        if self.exit_code is None and self._remove(PAUSE):
            self.exit_code = 130
        exit_code, save = self.agree([self.exit_code or 0, int(self._remove(SAVE))])
        self.exit_code = exit_code or None
        return self.exit_code is not None, bool(save)

    def _remove(self, name: str) -> bool:
        """Whether the file existed."""
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True


def _detach_from_terminal() -> None:
    """Redirects output of a closed terminal to /dev/null: printing must not fail before the checkpoint is saved."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            os.dup2(null, stream)
    os.close(null)
