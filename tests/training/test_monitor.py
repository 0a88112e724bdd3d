"""What a run warns of and does when its numbers go wrong: not finite, no gradient, exploding, overfitting."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from sft import runs
from sft.config.schema import EarlyStoppingSection
from sft.errors import RunError
from sft.step import step as one_step
from sft.training.loop import step_batches
from sft.training.monitor import LossMonitor
from tests.training import bench

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 99, "load_best_model_at_end": False}
BAD = 63  # a token that only one row has


def poisoned(monkeypatch: pytest.MonkeyPatch, settings: Any, row: int) -> bench.TrainingLoop:
    """A loop in which whatever is computed together with row `row` has a NaN loss."""
    loop = bench.make_loop(settings)
    loop.rows[row]["input_ids"][0] = BAD
    real = one_step.token_losses

    def token_losses(model: Any, micro: Any, config: Any) -> Any:
        losses = real(model, micro, config)
        return losses * float("nan") if bool((micro.inputs["input_ids"] == BAD).any()) else losses

    monkeypatch.setattr(one_step, "token_losses", token_losses)
    return loop


def step_of_row(loop: bench.TrainingLoop, row: int) -> tuple[int, list[str]]:
    """The step of the first epoch that trains on the row, and the ids of that step's rows."""
    steps = step_batches(len(loop.rows), 4, loop.settings.seed, 0)
    return next((step, [f"row-{index}" for index in rows]) for step, rows in enumerate(steps, 1) if row in rows)


def test_a_nan_stops_with_the_rows_of_its_step_the_row_itself_and_the_finite_checkpoint(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = poisoned(monkeypatch, bench.config(tiny_qwen2, tmp_path / "outputs/a", train=EVERY_STEP), row=3)
    step, ids = step_of_row(loop, 3)
    with pytest.raises(RunError, match=f"the loss is nan at step {step}") as caught:
        loop.fit()
    assert caught.value.where == f"the rows of this step: {', '.join(ids)}; not finite by themselves: row-3"
    saved = loop.checkpoints.run.checkpoints()
    assert [runs.step_of(path) for path in saved] == list(range(1, step))
    assert all(torch.isfinite(weight).all() for weight in bench.trained(loop).values())


def test_skip_drops_the_step_counts_it_and_resumes_exactly(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bench.config(tiny_qwen2, tmp_path / "outputs/a", train={**EVERY_STEP, "on_nan": "skip"})
    loop = poisoned(monkeypatch, settings, row=3)
    step, ids = step_of_row(loop, 3)
    loop.fit()
    first, *later = loop.progress.skipped
    assert (first["step"], first["rows"], len(later)) == (step, ids, 2)
    assert all(torch.isfinite(weight).all() for weight in bench.trained(loop).values())
    assert [entry["windows_skipped"] for entry in loop.progress.log_history if "windows_skipped" in entry][-1] == 3
    again = poisoned(monkeypatch, settings, row=3)
    again.fit(tmp_path / f"outputs/a/checkpoint-{step + 1}")
    assert again.progress.skipped == loop.progress.skipped
    assert all(torch.equal(one, bench.trained(again)[name]) for name, one in bench.trained(loop).items())


def test_skip_works_with_a_gradient_scaler(tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = bench.config(tiny_qwen2, tmp_path / "outputs/a", train={"on_nan": "skip", "epochs": 1})
    loop = poisoned(monkeypatch, settings, row=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as accelerate makes one for fp16 on a GPU
    loop.accelerator.scaler = scaler
    loop.optimizer = AcceleratedOptimizer(loop.optimizer.optimizer, scaler=scaler)
    monkeypatch.setattr(loop.accelerator, "unscale_gradients", lambda: scaler.unscale_(loop.optimizer.optimizer))
    loop.fit()
    assert loop.progress.global_step == 3 and len(loop.progress.skipped) == 1
    assert all(torch.isfinite(weight).all() for weight in bench.trained(loop).values())


def test_a_gradient_that_is_not_finite_is_dropped_too(tiny_qwen2: Path, tmp_path: Path) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs/a", train={"on_nan": "skip", "max_steps": 1}))
    before, weight = bench.trained(loop), next(p for p in loop.model.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    loop.fit()
    assert loop.progress.skipped[0]["what"].startswith("gradient norm is")
    assert all(torch.equal(one, bench.trained(loop)[name]) for name, one in before.items())


def warnings_of(pairs: Sequence[tuple[float, float]]) -> list[str | None]:
    """A monitor's warnings after each evaluation; it sees pairs of (training loss, evaluation loss)."""
    monitor, warnings = LossMonitor(None, False, EarlyStoppingSection()), []
    for step, (train, evaluation) in enumerate(pairs, 1):
        monitor.add({"loss": train, "step": step})
        warnings.append(monitor.add({"eval_loss": evaluation, "step": step, **monitor.gap(evaluation)}))
    return warnings


def test_twenty_steps_without_a_gradient_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LossMonitor("loss", False, EarlyStoppingSection())
    logging.getLogger("sft").propagate = True
    for norm in [0.0] * 19 + [0.1] + [0.0] * 30:
        monitor.gradient(norm)
    assert [record.message.split(":")[0] for record in caplog.records] == ["no gradient for 20 steps"]


@pytest.mark.parametrize(
    ("losses", "warned_at"),
    [
        ([2.0, 1.6, 1.9, 1.2, 1.5, 1.3, 1.7], []),
        ([0.02, 0.03, 0.01, 0.09, 0.12, 0.08], []),
        ([2.0, 1.6, 1.2, 4.0, 6.0, 8.0, 9.0], [6]),  # once
    ],
)
def test_an_exploding_loss_is_distinguished_from_a_noisy_one(losses: list[float], warned_at: list[int]) -> None:
    monitor = LossMonitor("loss", False, EarlyStoppingSection())
    warnings = {step: monitor.add({"loss": loss, "step": step}) for step, loss in enumerate(losses, 1)}
    assert [step for step, warning in warnings.items() if warning] == warned_at
    assert all("the loss explodes: 8.000 at step 6, it was 1.200" in str(warnings[step]) for step in warned_at)


def test_overfitting_is_warned_of_once_when_the_losses_diverge() -> None:
    assert warnings_of([(2.0, 2.0), (1.5, 1.55)]) == [None, None]
    assert warnings_of([(2.0, 2.0), (0.02, 0.012), (0.01, 0.017)])[-1] is None  # less than 0.01 is noise
    diverged = str(warnings_of([(2.0, 2.0), (1.6, 1.55), (1.59, 1.60)])[-1])
    assert diverged.startswith("overfitting: evaluation loss rose from 1.5500 at step 2 to 1.6000, while training loss")
    assert "fell to 1.5900" in diverged
    assert warnings_of([(2.0, 2.0), (1.6, 1.55), (1.59, 1.60), (1.58, 1.59), (1.57, 1.61)])[3:] == [None, None]
    assert warnings_of([(2.0, 2.0), (1.6, 1.55), (1.7, 1.70)])[-1] is None  # both rise: no overfitting


def test_a_monitor_that_replays_the_entries_of_a_run_warns_and_stops_as_the_first_one() -> None:
    early = EarlyStoppingSection(enabled=True, patience=2)
    entries = [
        entry
        for step, loss in enumerate([3.0, 2.0, 2.5, 2.6], 1)
        for entry in ({"loss": loss / 2, "step": step}, {"eval_loss": loss, "eval_gap": loss / 2, "step": step})
    ]
    first = LossMonitor("loss", False, early)
    for entry in entries[:5]:
        first.add(entry)
    again = LossMonitor("loss", False, early)
    for entry in entries[:5]:
        again.add(entry)
    for entry in entries[5:]:
        assert first.add(entry) == again.add(entry)
        assert first.stop_early == again.stop_early
    assert first.stop_early


def test_the_gap_is_logged_with_each_evaluation(tiny_qwen2: Path, tmp_path: Path) -> None:
    train = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs/a", train=train))
    loop.fit()
    log = loop.progress.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    gaps = [(entry["eval_loss"], entry["eval_gap"]) for entry in log if "eval_gap" in entry]
    assert gaps == [
        (loss, pytest.approx(loss - sum(losses[at : at + 2]) / 2)) for (loss, _), at in zip(gaps, (0, 2), strict=True)
    ]
