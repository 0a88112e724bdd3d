"""Signals and files that stop or save a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sft.training.signals import SignalHandler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_is_remembered_with_its_exit_code(tmp_path: Path, number: int, code: int) -> None:
    with SignalHandler(tmp_path) as watch:
        assert not watch.asked_to_stop()
        os.kill(os.getpid(), number)
        assert watch.asked_to_stop() and watch.code == code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with SignalHandler(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler(tmp_path) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not watch.asked_to_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_files_pause_and_save_are_obeyed_once(tmp_path: Path) -> None:
    (tmp_path / "pause").touch()  # from before the run: not for it
    with SignalHandler(tmp_path) as watch:
        assert not watch.asked_to_stop()
        (tmp_path / "save").touch()
        assert watch.asked_to_save() and not watch.asked_to_save()
        (tmp_path / "pause").touch()
        assert watch.asked_to_stop() and watch.code == 130
        assert not (tmp_path / "pause").exists()
