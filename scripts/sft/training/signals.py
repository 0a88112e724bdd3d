"""Stopping at a step boundary: Ctrl-C, SIGTERM, a closed terminal, the files `pause` and `save` in the run's folder.

The first signal is remembered and obeyed after the step; a second Ctrl-C stops at once. A signal that was ignored when
the command started (nohup) stays ignored.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from sft.runs import PAUSE, SAVE

log = logging.getLogger("sft.training")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}


class SignalHandler:
    """Watches for a wish to stop or save while its `with` block runs. `code` is the exit code asked for, or None.

    agree: makes all ranks see what any of them saw (identity in one process).
    """

    def __init__(self, folder: Path, agree: Callable[[int], int] = lambda code: code) -> None:
        self.folder, self.agree = folder, agree
        self.code: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        (self.folder / PAUSE).unlink(missing_ok=True)
        (self.folder / SAVE).unlink(missing_ok=True)
        for number in CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if self.code is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = CODES[signal.Signals(number)]
        if number == signal.SIGHUP:
            _let_go_of_the_terminal()
        log.warning("stopping after this step, with a checkpoint (Ctrl-C again stops at once)")

    def asked_to_stop(self) -> bool:
        """Whether to stop now; the same answer on every rank. A `pause` file is taken away when it is obeyed."""
        if self.code is None and self._taken(PAUSE):
            self.code = 130
        self.code = self.agree(self.code or 0) or None
        return self.code is not None

    def asked_to_save(self) -> bool:
        """Whether a checkpoint is wished for without stopping."""
        return bool(self.agree(int(self._taken(SAVE))))

    def _taken(self, name: str) -> bool:
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True


def _let_go_of_the_terminal() -> None:
    """Sends output for a terminal that was closed to nowhere: printing must not fail before the checkpoint is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)
