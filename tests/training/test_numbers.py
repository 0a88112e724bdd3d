"""What a run says when its numbers go wrong, and what it does about it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sft import runs
from sft.errors import RunError
from sft.step import step as one_step
from sft.training import numbers
from sft.training.numbers import Numbers
from tests.training import bench

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 99, "load_best_model_at_end": False}
BAD = 63  # a token that stands in one row alone


def poisoned(monkeypatch: pytest.MonkeyPatch, settings: Any, row: int) -> bench.WindowTrainer:
    """A trainer in which whatever is computed together with row `row` has a NaN loss."""
    trainer = bench.trainer(settings)
    trainer.rows[row]["input_ids"][0] = BAD
    real = one_step.token_losses

    def token_losses(model: Any, micro: Any, config: Any) -> Any:
        losses = real(model, micro, config)
        return losses * float("nan") if bool((micro.inputs["input_ids"] == BAD).any()) else losses

    monkeypatch.setattr(one_step, "token_losses", token_losses)
    return trainer


def step_of_row(trainer: bench.WindowTrainer, row: int) -> tuple[int, list[str]]:
    """The step of the first epoch that takes the row, and the rows of that step."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    windows = [batch["ids"] for batch in loader]
    return next((step, ids) for step, ids in enumerate(windows, 1) if f"row-{row}" in ids)


def test_a_nan_stops_with_the_rows_of_its_step_the_row_itself_and_the_finite_checkpoint(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = poisoned(monkeypatch, bench.config(tiny_qwen2, tmp_path / "outputs/a", train=EVERY_STEP), row=3)
    step, ids = step_of_row(trainer, 3)
    with pytest.raises(RunError, match=f"the loss is nan at step {step}") as caught:
        trainer.fit(None)
    assert caught.value.where == f"the rows of this step: {', '.join(ids)}; not finite by themselves: row-3"
    kept = trainer.keeper.run.checkpoints()
    assert [runs.step_of(path) for path in kept] == list(range(1, step))
    assert all(torch.isfinite(weight).all() for weight in bench.trained(trainer).values())


def test_skip_drops_the_window_counts_it_and_resumes_exactly(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bench.config(tiny_qwen2, tmp_path / "outputs/a", train={**EVERY_STEP, "on_nan": "skip"})
    trainer = poisoned(monkeypatch, settings, row=3)
    step, ids = step_of_row(trainer, 3)
    trainer.fit(None)
    first, *later = trainer.numbers.skipped
    assert (first["step"], first["rows"], len(later)) == (step, ids, 2)
    assert all(torch.isfinite(weight).all() for weight in bench.trained(trainer).values())
    assert [entry["windows_skipped"] for entry in trainer.state.log_history if "windows_skipped" in entry][-1] == 3
    again = poisoned(monkeypatch, settings, row=3)
    again.fit(tmp_path / f"outputs/a/checkpoint-{step + 1}")
    assert again.numbers.skipped == trainer.numbers.skipped
    assert all(torch.equal(one, bench.trained(again)[name]) for name, one in bench.trained(trainer).items())


def test_a_gradient_that_is_not_finite_is_dropped_too(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs/a", train={"on_nan": "skip", "max_steps": 1}))
    before, weight = bench.trained(trainer), next(p for p in trainer.model.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer.fit(None)
    assert trainer.numbers.skipped[0]["what"].startswith("gradient norm is")
    assert all(torch.equal(one, bench.trained(trainer)[name]) for name, one in before.items())


def test_twenty_steps_without_a_gradient_are_said_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    judge = Numbers("stop", runs.at(tmp_path, tmp_path), lambda ids: [])
    logging.getLogger("sft").propagate = True
    for norm in [0.0] * 19 + [0.1] + [0.0] * 30:
        judge.gradient(norm)
    assert [record.message.split(":")[0] for record in caplog.records] == ["no gradient for 20 steps"]


def test_an_exploding_loss_is_told_from_a_noisy_one() -> None:
    assert not numbers.exploded([2.0, 1.6, 1.9, 1.2, 1.5, 1.3, 1.7])
    assert not numbers.exploded([0.02, 0.03, 0.01, 0.09, 0.12, 0.08])
    assert numbers.exploded([2.0, 1.6, 1.2, 4.0, 6.0, 8.0])


def history(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Logged training and evaluation losses, one of each at a time."""
    made: list[dict[str, float]] = []
    for step, (train, evaluation) in enumerate(pairs, 1):
        made.append({"loss": train, "step": step})
        made.append({"eval_loss": evaluation, "step": step, **numbers.gap(made, evaluation)})
    return made


def test_overfitting_is_said_when_the_losses_part() -> None:
    assert numbers.overfitting(history((2.0, 2.0), (1.5, 1.55))) == []
    assert numbers.overfitting(history((2.0, 2.0), (0.02, 0.012), (0.01, 0.017))) == []  # less than 0.01 is noise
    (parted,) = numbers.overfitting(history((2.0, 2.0), (1.6, 1.55), (1.59, 1.60)))
    assert parted.startswith("overfitting: evaluation loss rose to 1.6000 while training loss fell to 1.5900")
    assert "best at step 2 (1.5500)" in parted
    parts_again = history((2.0, 2.0), (1.6, 1.55), (1.59, 1.60), (1.58, 1.59), (1.57, 1.61))
    assert numbers.overfitting(parts_again) == []  # said once
    (apart,) = numbers.overfitting(history((2.0, 2.0), (1.0, 1.15)))
    assert apart.startswith("evaluation loss is 0.150 above training loss (more than 0.1)")
    assert numbers.overfitting(history((2.0, 2.0), (1.0, 1.15), (0.9, 1.14))) == []  # said once


def test_the_gap_is_logged_with_each_evaluation(tiny_qwen2: Path, tmp_path: Path) -> None:
    train = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs/a", train=train))
    trainer.fit(None)
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    gaps = [(entry["eval_loss"], entry["eval_gap"]) for entry in log if "eval_gap" in entry]
    assert gaps == [
        (loss, pytest.approx(loss - sum(losses[at : at + 2]) / 2)) for (loss, _), at in zip(gaps, (0, 2), strict=True)
    ]
