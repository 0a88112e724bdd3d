"""What TensorBoard and log.jsonl hold, before and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from sft.training import loggers


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def write(tmp_path: Path, after: int, steps: range, offset: float) -> None:
    logger = loggers.Loggers(tmp_path / "log.jsonl", tmp_path / "tb", after_step=after)
    for step in steps:
        logger.entry(step, {"eval_loss": step + offset})
    logger.close(steps[-1], {}, {})


def test_a_resumed_run_leaves_one_curve_without_overlap(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6), 0.0)
    write(tmp_path, 3, range(4, 7), 0.5)  # resumed at checkpoint-3
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert scalars(tmp_path / "tb", "eval/loss") == expected
    assert [(entry["step"], entry["eval/loss"]) for entry in loggers.read(tmp_path / "log.jsonl")] == expected


def test_an_incomplete_line_of_a_crash_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo', encoding="utf-8")
    assert loggers.read(path) == [{"step": 1, "train/loss": 2.0}]
    loggers.Loggers(path, after_step=5).entry(3, {"eval_loss": 1.0})
    assert [entry["step"] for entry in loggers.read(path)] == [1, 3]


def test_a_disk_that_refuses_tensorboards_last_file_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr(SummaryWriter, "add_hparams", refuse)
    logger = loggers.Loggers(tmp_path / "log.jsonl", tmp_path / "tb")
    logger.close(7, {"rows": 1}, {"hparam/loss": 1.0})
    assert "TensorBoard's curves end at step 7 (no space left on the device)" in caplog.text


def test_entries_are_logged_under_their_public_names() -> None:
    logs = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0, "eval_rougeL": 0.5, "epoch": 1, "other": 3}
    assert loggers.public_names(logs) == {
        "train/loss": 1.0,
        "train/lr": 0.1,
        "train/grad_norm": 2.0,
        "train/epoch": 1.0,
        "eval/rougeL": 0.5,
    }


def test_log_jsonl_is_valid_json_where_a_number_is_not_finite(tmp_path: Path) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    path = tmp_path / "log.jsonl"
    loggers.Loggers(path).entry(1, {"grad_norm": float("inf"), "eval_loss": 2.0, "eval_x": float("nan")})
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "train/grad_norm": None,
        "eval/loss": 2.0,
        "eval/x": None,
    }
