"""Signals and files that stop or save a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sft.training.signals import SignalHandler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_is_noted_with_its_exit_code(tmp_path: Path, number: int, code: int) -> None:
    with SignalHandler(tmp_path) as handler:
        assert not handler.poll()[0]
        os.kill(os.getpid(), number)
        assert handler.poll()[0] and handler.exit_code == code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with SignalHandler(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler(tmp_path) as handler:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not handler.poll()[0]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_files_pause_and_save_take_effect_once(tmp_path: Path) -> None:
    (tmp_path / "pause").touch()  # from before the run: ignored
    with SignalHandler(tmp_path) as handler:
        assert not handler.poll()[0]
        (tmp_path / "save").touch()
        assert handler.poll()[1] and not handler.poll()[1]
        (tmp_path / "pause").touch()
        assert handler.poll()[0] and handler.exit_code == 130
        assert not (tmp_path / "pause").exists()
