"""Stopping and going on gives, bit for bit, what going straight through gives."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sft import files, runs
from tests.training import bench

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 99, "load_best_model_at_end": False}
PARTS = {"optimizer.pt", "rng.pt", "scheduler.json", "session.json", "trainer_state.json", "manifest.json"}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["qlora", "lora", "full"])
def test_resuming_mid_epoch_and_at_its_end_gives_the_same_weights(tiny_qwen2: Path, tmp_path: Path, mode: str) -> None:
    straight = bench.trainer(
        bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": mode}, train=EVERY_STEP)
    )
    straight.fit(None)
    for step in (4, 6):
        out = tmp_path / "outputs" / f"from-{step}"
        shutil.copytree(tmp_path / "outputs" / "a", out)  # a moved run resumes too
        again = bench.trainer(bench.config(tiny_qwen2, out, tuning={"mode": mode}, train=EVERY_STEP))
        again.fit(out / f"checkpoint-{step}")
        assert same(bench.trained(straight), bench.trained(again))
        assert again.state.log_history[-1]["eval_loss"] == straight.state.log_history[-1]["eval_loss"]
        assert (
            again.meter.state()["tokens"] == straight.meter.tokens and again.meter.labelled == straight.meter.labelled
        )
        assert (out / f"set-aside-checkpoint-{step + 1}").is_dir() and (out / f"checkpoint-{step + 1}").is_dir()


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
def test_rows_in_groups_of_like_length_resume_exactly_too(tiny_qwen2: Path, tmp_path: Path, mode: str) -> None:
    def settings(out: Path) -> Any:
        train = {**EVERY_STEP, "max_steps": 4, "micro_batch_tokens": 40}
        made = bench.config(tiny_qwen2, out, tuning={"mode": mode}, train=train)
        return made.model_copy(update={"model": made.model.model_copy(update={"attn_implementation": "eager"})})

    straight = bench.trainer(settings(tmp_path / "outputs" / "a"))
    assert not straight.step_config.packed
    straight.fit(None)
    out = Path(shutil.copytree(tmp_path / "outputs" / "a", tmp_path / "outputs" / "b"))
    again = bench.trainer(settings(out))
    again.fit(out / "checkpoint-2")
    assert same(bench.trained(straight), bench.trained(again))


def test_another_cut_of_the_step_is_simply_taken_and_said(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "outputs" / "a"
    train = {**EVERY_STEP, "max_steps": 4}
    straight = bench.trainer(bench.config(tiny_qwen2, out, train=train, tuning={"lora": {"dropout": 0.0}}))
    straight.fit(None)
    finer = bench.config(tiny_qwen2, out, train={**train, "micro_batch_tokens": 32}, tuning={"lora": {"dropout": 0.0}})
    again = bench.trainer(finer)
    logging.getLogger("sft").propagate = True
    with caplog.at_level(logging.INFO, "sft.training"):
        again.fit(out / "checkpoint-2")
    assert any("cut otherwise than before: same steps, last bits may differ" in one.message for one in caplog.records)
    other = bench.trained(again)
    assert all(torch.allclose(one, other[name], atol=1e-5) for name, one in bench.trained(straight).items())


def test_another_rate_or_plan_that_was_allowed_is_taken_and_the_jump_is_said(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, train = tmp_path / "outputs" / "a", {**EVERY_STEP, "max_steps": 4, "lr_scheduler_type": "linear"}
    bench.trainer(bench.config(tiny_qwen2, out, train=train)).fit(None)
    again = bench.trainer(
        bench.config(tiny_qwen2, out, train={**train, "max_steps": 8, "learning_rate": 1e-3, "weight_decay": 0.5})
    )
    logging.getLogger("sft").propagate = True
    again.fit(out / "checkpoint-2")
    rates = [entry["learning_rate"] for entry in again.state.log_history if "loss" in entry]
    assert rates[2:] == [pytest.approx(1e-3 * left / 7) for left in (6, 5, 4, 3, 2, 1)]
    assert any("learning rate jumps from" in one.message for one in caplog.records)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.5, 0.0}


@pytest.mark.parametrize("budget", [4096, 24])  # a step at once; in groups of like length
def test_a_seq2seq_model_resumes_exactly(tiny_t5: Path, tmp_path: Path, budget: int) -> None:
    train = {**EVERY_STEP, "learning_rate": 1e-3, "micro_batch_tokens": budget}
    made = {"tuning": {"mode": "full"}, "train": train}
    straight = bench.trainer(bench.config(tiny_t5, tmp_path / "outputs" / "a", **made))
    straight.fit(None)
    out = shutil.copytree(tmp_path / "outputs" / "a", tmp_path / "outputs" / "b")
    again = bench.trainer(bench.config(tiny_t5, Path(out), **made))
    again.fit(Path(out) / "checkpoint-5")
    assert same(bench.trained(straight), bench.trained(again))
    assert straight.state.log_history[-1]["eval_loss"] < straight.state.log_history[1]["loss"]


def test_a_checkpoint_of_the_last_step_is_the_result_and_trains_no_more(tiny_qwen2: Path, tmp_path: Path) -> None:
    made = {"train": {**EVERY_STEP, "max_steps": 4}}  # ends mid-epoch: the library's loop would take a fifth step
    straight = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", **made))
    straight.fit(None)
    again = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", **made))
    again.fit(tmp_path / "outputs" / "a" / "checkpoint-4")
    assert again.state.global_step == 4
    assert same(bench.trained(straight), bench.trained(again))


def test_a_stop_is_obeyed_at_the_step_boundary_and_resumes_exactly(tiny_qwen2: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class PauseAt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                (Path(args.output_dir) / runs.PAUSE).touch()

    straight = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"))
    straight.fit(None)
    settings = bench.config(tiny_qwen2, tmp_path / "outputs" / "b")
    stopped = bench.trainer(settings, callbacks=[PauseAt()])
    stopped.fit(None)
    assert (stopped.flow.watch.code, stopped.state.global_step) == (130, 5)
    assert not (tmp_path / "outputs" / "b" / runs.PAUSE).exists()
    again = bench.trainer(settings)
    again.fit(tmp_path / "outputs" / "b" / "checkpoint-5")
    assert same(bench.trained(straight), bench.trained(again))


def test_a_checkpoint_holds_what_it_should_and_no_other_pickle(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train={"max_steps": 1}))
    trainer.fit(None)
    folder = tmp_path / "outputs" / "a" / "checkpoint-1"
    adapter = {"adapter_model.safetensors", "adapter_config.json", "base.json"}
    assert {path.name for path in folder.iterdir()} == PARTS | adapter | {"config.resolved.yaml"}
    assert files.manifest_problem(folder) is None
    for name in ("optimizer.pt", "rng.pt"):
        torch.load(folder / name, weights_only=True)


def test_only_the_newest_checkpoints_and_the_best_one_stay(tiny_qwen2: Path, tmp_path: Path) -> None:
    train = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 1,
    }
    # a rate this high makes the first evaluation the best one
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train={**train, "learning_rate": 5.0}))
    trainer.fit(None)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert best < 9
    assert {path.name for path in trainer.keeper.run.checkpoints()} == {f"checkpoint-{best}", "checkpoint-9"}
    assert trainer.take_best() == best
    assert abs(trainer.evaluate()["eval_loss"] - min(losses)) < 1e-6
