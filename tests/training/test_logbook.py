"""What TensorBoard and log.jsonl hold, before and after a resume."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft.training import loggers


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def write(tmp_path: Path, after: int, steps: range, offset: float) -> None:
    books = [loggers.JsonLines(tmp_path / "log.jsonl", after), loggers.Board(tmp_path / "tb", after)]
    for step in steps:
        for book in books:
            book.numbers(step, {"train/loss": step + offset})
    for book in books:
        book.close()


def test_a_resumed_run_leaves_one_curve_without_overlap(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6), 0.0)
    write(tmp_path, 3, range(4, 7), 0.5)  # taken up at checkpoint-3
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert scalars(tmp_path / "tb", "train/loss") == expected
    assert [(entry["step"], entry["train/loss"]) for entry in loggers.read(tmp_path / "log.jsonl")] == expected


def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo', encoding="utf-8")
    assert loggers.read(path) == [{"step": 1, "train/loss": 2.0}]
    loggers.JsonLines(path, 5).numbers(3, {"train/loss": 1.0})
    assert [entry["step"] for entry in loggers.read(path)] == [1, 3]


def test_the_trainers_names_become_ours() -> None:
    logs = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0, "eval_rougeL": 0.5, "epoch": 1, "other": 3}
    assert loggers.named(logs) == {
        "train/loss": 1.0,
        "train/lr": 0.1,
        "train/grad_norm": 2.0,
        "train/epoch": 1.0,
        "eval/rougeL": 0.5,
    }
