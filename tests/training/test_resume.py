"""A stopped and resumed run gives, bit for bit, the result of an uninterrupted one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from sft import files, runs
from sft.training import checkpoint, distributed
from tests.training import bench

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 99, "load_best_model_at_end": False}
PARTS = {"optimizer.pt", "rng.pt", "scheduler.json", "trainer_state.json", "manifest.json"}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["qlora", "lora", "full"])
def test_resuming_mid_epoch_and_at_its_end_gives_the_same_weights(tiny_qwen2: Path, tmp_path: Path, mode: str) -> None:
    straight = bench.make_loop(
        bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": mode}, train=EVERY_STEP)
    )
    straight.fit()
    for step in (4, 6):
        out = tmp_path / "outputs" / f"from-{step}"
        shutil.copytree(tmp_path / "outputs" / "a", out)  # a moved run resumes too
        again = bench.make_loop(bench.config(tiny_qwen2, out, tuning={"mode": mode}, train=EVERY_STEP))
        again.fit(out / f"checkpoint-{step}")
        assert same(bench.trained(straight), bench.trained(again))
        assert again.progress.log_history[-1]["eval_loss"] == straight.progress.log_history[-1]["eval_loss"]
        assert again.progress.tokens == straight.progress.tokens
        assert again.progress.labelled == straight.progress.labelled
        assert (out / f"set-aside-checkpoint-{step + 1}").is_dir() and (out / f"checkpoint-{step + 1}").is_dir()


@pytest.mark.parametrize(
    "tuning",
    [
        {"mode": "qlora", "lora": {"r": 4, "dropout": 0.0, "init": "pissa_niter_1", "lora_plus_ratio": 4}},
        {"mode": "full", "freeze": ["embed_tokens"]},
        {"mode": "lora", "adapter": "prefix", "prefix_tokens": 3},
    ],
    ids=["pissa", "freeze", "prefix"],
)
def test_methods_resume_exactly(tiny_qwen2: Path, tmp_path: Path, tuning: dict[str, Any]) -> None:
    train = {**EVERY_STEP, "neftune_alpha": 5, "max_steps": 4}
    straight = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning=tuning, train=train))
    straight.fit()
    out = Path(shutil.copytree(tmp_path / "outputs" / "a", tmp_path / "outputs" / "b"))
    again = bench.make_loop(bench.config(tiny_qwen2, out, tuning=tuning, train=train))
    again.fit(out / "checkpoint-2")
    assert same(bench.trained(straight), bench.trained(again))
    assert bench.logged(again, "loss") == bench.logged(straight, "loss")


FREE = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {},
    "lion_32bit": {"learning_rate": 1e-3},
    "adafactor": {},
    "schedule_free_adamw": FREE,
    "schedule_free_sgd": {**FREE, "learning_rate": 0.5},
}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_each_optimizer_learns_and_resumes_exactly_even_from_an_extra_checkpoint(
    tiny_qwen2: Path, tmp_path: Path, optim: str
) -> None:
    if optim.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    train = {"optim": optim, "save_strategy": "no", "epochs": 4, "load_best_model_at_end": False, **OPTIMIZERS[optim]}
    loops = []
    for name, more in (("a", {}), ("b", {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 99})):
        settings = bench.config(
            tiny_qwen2, tmp_path / "outputs" / name, tuning={"mode": "full"}, train={**train, **more}
        )
        loops.append(bench.make_loop(settings))
        loops[-1].fit()
    straight, saving = loops
    losses = bench.logged(straight, "loss")
    assert sum(losses[-3:]) < sum(losses[:3])
    assert same(bench.trained(straight), bench.trained(saving))  # saving changes no bit of what is trained
    again = bench.make_loop(settings)
    again.fit(tmp_path / "outputs" / "b" / "checkpoint-5")
    assert same(bench.trained(straight), bench.trained(again)) and bench.logged(again, "loss") == losses
    assert again.evaluate()["eval_loss"] == bench.logged(straight, "eval_loss")[-1]


@pytest.mark.parametrize("mode", ["qlora", "full"])
def test_rows_in_groups_of_similar_length_resume_exactly_too(tiny_qwen2: Path, tmp_path: Path, mode: str) -> None:
    def settings(out: Path) -> Any:
        train = {**EVERY_STEP, "max_steps": 4, "micro_batch_tokens": 40}
        config = bench.config(tiny_qwen2, out, tuning={"mode": mode}, train=train)
        return config.model_copy(update={"model": config.model.model_copy(update={"attn_implementation": "eager"})})

    straight = bench.make_loop(settings(tmp_path / "outputs" / "a"))
    assert not straight.step.packed
    straight.fit()
    out = Path(shutil.copytree(tmp_path / "outputs" / "a", tmp_path / "outputs" / "b"))
    again = bench.make_loop(settings(out))
    again.fit(out / "checkpoint-2")
    assert same(bench.trained(straight), bench.trained(again))


def test_another_split_of_the_step_is_accepted_with_a_notice(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "outputs" / "a"
    train = {**EVERY_STEP, "max_steps": 4}
    straight = bench.make_loop(bench.config(tiny_qwen2, out, train=train, tuning={"lora": {"dropout": 0.0}}))
    straight.fit()
    finer = bench.config(tiny_qwen2, out, train={**train, "micro_batch_tokens": 32}, tuning={"lora": {"dropout": 0.0}})
    again = bench.make_loop(finer)
    logging.getLogger("sft").propagate = True
    with caplog.at_level(logging.INFO, "sft.training"):
        again.fit(out / "checkpoint-2")
    assert any(
        "split differently than before: same steps, but the last bits may differ" in one.message
        for one in caplog.records
    )
    other = bench.trained(again)
    assert all(torch.allclose(one, other[name], atol=1e-5) for name, one in bench.trained(straight).items())


def test_another_rate_or_schedule_that_was_allowed_is_used_with_a_warning(
    tiny_qwen2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, train = tmp_path / "outputs" / "a", {**EVERY_STEP, "max_steps": 4, "lr_scheduler_type": "linear"}
    bench.make_loop(bench.config(tiny_qwen2, out, train=train)).fit()
    again = bench.make_loop(
        bench.config(tiny_qwen2, out, train={**train, "max_steps": 8, "learning_rate": 1e-3, "weight_decay": 0.5})
    )
    logging.getLogger("sft").propagate = True
    again.fit(out / "checkpoint-2")
    rates = [entry["learning_rate"] for entry in again.progress.log_history if "loss" in entry]
    assert rates[2:] == [pytest.approx(1e-3 * left / 7) for left in (6, 5, 4, 3, 2, 1)]
    assert any("learning rate changes from" in one.message for one in caplog.records)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.5, 0.0}


@pytest.mark.parametrize("budget", [4096, 24])  # a step at once; in groups of like length
def test_a_seq2seq_model_resumes_exactly(tiny_t5: Path, tmp_path: Path, budget: int) -> None:
    train = {**EVERY_STEP, "learning_rate": 1e-3, "micro_batch_tokens": budget}
    sections = {"tuning": {"mode": "full"}, "train": train}
    straight = bench.make_loop(bench.config(tiny_t5, tmp_path / "outputs" / "a", **sections))
    straight.fit()
    out = shutil.copytree(tmp_path / "outputs" / "a", tmp_path / "outputs" / "b")
    again = bench.make_loop(bench.config(tiny_t5, Path(out), **sections))
    again.fit(Path(out) / "checkpoint-5")
    assert same(bench.trained(straight), bench.trained(again))
    assert straight.progress.log_history[-1]["eval_loss"] < straight.progress.log_history[1]["loss"]


def test_resuming_at_the_last_step_trains_no_further(tiny_qwen2: Path, tmp_path: Path) -> None:
    sections = {"train": {**EVERY_STEP, "max_steps": 4}}  # ends mid-epoch
    straight = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", **sections))
    straight.fit()
    again = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", **sections))
    again.fit(tmp_path / "outputs" / "a" / "checkpoint-4")
    assert again.progress.global_step == 4
    assert same(bench.trained(straight), bench.trained(again))


def test_a_stop_takes_effect_at_the_step_boundary_and_resumes_exactly(tiny_qwen2: Path, tmp_path: Path) -> None:
    straight = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"))
    straight.fit()
    settings = bench.config(tiny_qwen2, tmp_path / "outputs" / "b")
    stopped = bench.make_loop(settings)
    train_step = stopped.train_step

    def pause_in_step_5(batch: Any) -> Any:
        if stopped.progress.global_step == 4:
            (tmp_path / "outputs" / "b" / runs.PAUSE).touch()
        return train_step(batch)

    stopped.train_step = pause_in_step_5  # type: ignore[method-assign]
    stopped.fit()
    assert (stopped.signals.exit_code, stopped.progress.global_step) == (130, 5)
    assert not (tmp_path / "outputs" / "b" / runs.PAUSE).exists()
    again = bench.make_loop(settings)
    again.fit(tmp_path / "outputs" / "b" / "checkpoint-5")
    assert same(bench.trained(straight), bench.trained(again))


def test_a_checkpoint_holds_what_it_should_and_no_other_pickle(tiny_qwen2: Path, tmp_path: Path) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train={"max_steps": 1}))
    loop.fit()
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
        "greater_is_better": True,  # so that the best of a falling loss is an early one
        "early_stopping": {"enabled": False},
    }
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train=train))
    loop.fit()
    losses = [entry["eval_loss"] for entry in loop.progress.log_history if "eval_loss" in entry]
    best = losses.index(max(losses)) + 1
    assert best < 9
    assert {path.name for path in loop.checkpoints.run.checkpoints()} == {f"checkpoint-{best}", "checkpoint-9"}
    assert loop.load_best() == best
    assert abs(loop.evaluate()["eval_loss"] - max(losses)) < 1e-6


@pytest.mark.parametrize("change", [{"metric_for_best_model": "perplexity"}, {"eval_strategy": "no"}])
def test_a_best_by_another_metric_is_forgotten_on_resume(
    tiny_qwen2: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    train = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1.0}

    def loop(**more: Any) -> Any:
        settings = bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train={**train, "max_steps": 3, **more})
        return bench.make_loop(settings)

    first = loop()
    first.fit()
    assert first.progress.best_global_step is not None
    again = loop(**change)
    again.resume(first.checkpoints.folder(2))
    assert again.progress.best_global_step is None and again.load_best() is None


def test_parameter_groups_keep_their_own_peak_rates_over_a_resume(tiny_qwen2: Path, tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]

    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.4}])
        return optimizer, get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)

    optimizer, schedule = make()
    optimizer.step()
    schedule.step()
    torch.save(optimizer.state_dict(), tmp_path / checkpoint.OPTIMIZER)
    (tmp_path / checkpoint.SCHEDULER).write_text(json.dumps(schedule.state_dict()))
    again, schedule = make()
    checkpoint.restore_optimizer(tmp_path, again, schedule)
    assert [group["lr"] for group in again.param_groups] == [pytest.approx(0.075), pytest.approx(0.3)]
    again.step()
    schedule.step()
    assert [group["lr"] for group in again.param_groups] == [pytest.approx(0.05), pytest.approx(0.2)]


def test_another_number_of_gpus_is_warned_of_and_the_rest_of_the_random_state_restored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("sft").propagate = True
    state = checkpoint.random_state()
    drawn = torch.rand(3)
    here = [] if not torch.cuda.is_available() else torch.cuda.get_rng_state_all()
    checkpoint.restore_random_state({**state, "cuda": [*here, torch.zeros(16, dtype=torch.uint8)]})
    assert torch.equal(torch.rand(3), drawn)
    assert f"written with {len(here) + 1} visible GPUs, now there are {len(here)}" in caplog.text


def test_a_rank_that_the_checkpoint_does_not_know_resumes_from_the_seed(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bench.config(tiny_qwen2, tmp_path / "outputs/a", train={**EVERY_STEP, "max_steps": 1})
    bench.make_loop(settings).fit()
    again = bench.make_loop(settings)
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # one process wrote it, now there are two
    before = torch.get_rng_state()
    again.resume(tmp_path / "outputs/a/checkpoint-1")
    assert again.progress.global_step == 1 and torch.equal(torch.get_rng_state(), before)
