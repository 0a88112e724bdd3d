"""The loop on real tiny models: every mode trains, the losses are exact means, errors name their rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import get_scheduler

from sft.errors import RunError
from sft.model import hub
from sft.training import job
from sft.training.loop import step_batches
from tests.training import bench


def base_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def test_qlora_trains_on_a_real_4_bit_base_that_stays_bit_identical(tiny_qwen2: Path, tmp_path: Path) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": "qlora"}))
    types = {type(module).__name__ for module in loop.model.modules()}
    before, adapters = base_bytes(loop.model), bench.trained(loop)
    loop.fit()
    assert "Linear4bit" in types
    assert base_bytes(loop.model) == before
    changed = [name for name, weight in bench.trained(loop).items() if not torch.equal(weight, adapters[name])]
    assert len(changed) == len(adapters) and all("lora_" in name for name in changed)
    assert bench.logged(loop, "loss")[-1] < bench.logged(loop, "loss")[0]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_loss_falls_and_only_what_should_change_changes(tiny_qwen2: Path, tmp_path: Path, mode: str) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": mode}))
    before, start = base_bytes(loop.model), bench.trained(loop)
    loop.fit()
    assert base_bytes(loop.model) == before
    assert not any(
        torch.equal(weight, start[name]) for name, weight in bench.trained(loop).items() if "norm" not in name
    )
    assert bench.logged(loop, "loss")[-1] < bench.logged(loop, "loss")[0]
    assert (len(before) == 0) == (mode == "full")


def test_a_tiny_gpt2_trains_in_lora_mode(tiny_gpt2: Path, tmp_path: Path) -> None:
    loop = bench.make_loop(bench.config(tiny_gpt2, tmp_path / "outputs" / "a"))
    loop.fit()
    assert bench.logged(loop, "loss")[-1] < bench.logged(loop, "loss")[0]


def test_bf16_trains_adapters_in_fp32_over_a_16_bit_base(tiny_qwen2: Path, tmp_path: Path) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train={"bf16": True}))
    kinds = {(p.requires_grad, p.dtype) for p in loop.model.parameters()}
    loop.fit()
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert bench.logged(loop, "loss")[-1] < bench.logged(loop, "loss")[0]


def test_full_mode_under_bf16_keeps_fp32_weights(tiny_qwen2: Path, tmp_path: Path) -> None:
    sections = {"tuning": {"mode": "full"}, "train": {"bf16": True}}
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", **sections))
    assert {p.dtype for p in loop.model.parameters()} == {torch.float32}
    loop.fit()
    assert bench.logged(loop, "loss")[-1] < bench.logged(loop, "loss")[0]


def plain_mean_loss(loop: bench.TrainingLoop, rows: list[dict]) -> float:
    """The mean over labelled tokens, one row at a time, without our code."""
    total = count = 0.0
    loop.model.eval()
    for row in rows:
        with torch.no_grad():
            logits = loop.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += float(functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        count += int((labels != -100).sum())
    return total / count


def test_eval_loss_is_the_exact_mean_over_labelled_tokens(tiny_qwen2: Path, tmp_path: Path) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"), validation=7)
    metrics = loop.evaluate()
    expected = plain_mean_loss(loop, bench.features(7, seed=1))
    assert abs(metrics["eval_loss"] - expected) < 1e-5
    assert abs(metrics["eval_perplexity"] - math.exp(expected)) < 1e-2


def test_the_logged_loss_is_the_mean_of_the_step_however_it_is_split(tiny_qwen2: Path, tmp_path: Path) -> None:
    lora = {"mode": "lora", "lora": {"dropout": 0.0}}
    losses = []
    for name, budget in (("a", 4096), ("b", 24)):
        train = {"effective_batch": 10, "max_steps": 3, "micro_batch_tokens": budget}
        loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / name, tuning=lora, train=train))
        expected = plain_mean_loss(loop, bench.features(10))
        loop.fit()
        losses.append(bench.logged(loop, "loss"))
        assert abs(losses[-1][0] - expected) < 1e-5
    assert all(abs(one - other) < 1e-5 for one, other in zip(*losses, strict=True))


@pytest.mark.parametrize("world", [1, 3])
def test_each_epoch_takes_every_row_once_in_another_order(world: int) -> None:
    epochs = []
    for epoch in range(2):
        shares = [[rows[rank::world] for rows in step_batches(10, 4, 42, epoch)] for rank in range(world)]
        assert [sum(len(share[step]) for share in shares) for step in range(3)] == [4, 4, 2]
        epochs.append([index for share in shares for step in share for index in step])
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1]


def test_the_loop_gives_the_losses_and_weights_of_a_plain_pytorch_loop(tiny_qwen2: Path, tmp_path: Path) -> None:
    train = {"max_steps": 5, "warmup_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1, "eval_strategy": "no"}
    settings = bench.config(
        tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": "full"}, train={**train, "learning_rate": 1e-3}
    )
    loop = bench.make_loop(settings)
    model = job.load_model(settings, hub.find(settings.model, Path("/")), "bnb", device="cpu").train()
    norms = [weight for name, weight in model.named_parameters() if "norm" in name or "bias" in name]
    others = [weight for weight in model.parameters() if not any(weight is norm for norm in norms)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=5)
    losses, rows = [], bench.features(10)
    for indices in (step_batches(10, 4, 42, 0) + step_batches(10, 4, 42, 1))[:5]:
        logits = [model(input_ids=torch.tensor([rows[index]["input_ids"]])).logits[0, :-1] for index in indices]
        labels = [torch.tensor(rows[index]["labels"][1:]) for index in indices]
        loss = functional.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loop.fit()
    assert bench.logged(loop, "loss") == pytest.approx(losses, abs=1e-6)
    for name, weight in model.named_parameters():
        assert torch.allclose(bench.trained(loop)[name], weight, rtol=0, atol=1e-5), name


def test_other_optimizers_train(tiny_qwen2: Path, tmp_path: Path) -> None:
    for optim in ("adafactor", "adamw_8bit", "sgd"):
        train = {"optim": optim, "max_steps": 2, "eval_strategy": "no"}
        loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / optim, train=train))
        before = bench.trained(loop)
        loop.fit()
        assert any(not torch.equal(weight, before[name]) for name, weight in bench.trained(loop).items())


def test_a_loss_that_is_not_finite_names_the_rows_of_the_step(tiny_qwen2: Path, tmp_path: Path) -> None:
    loop = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"))
    with torch.no_grad():
        next(p for p in loop.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(RunError, match="the loss is nan at step 1") as caught:
        loop.fit()
    assert str(caught.value.where).partition(";")[0].count("row-") == 4


def test_early_stopping_ends_the_run_and_its_last_checkpoint_knows_it(tiny_qwen2: Path, tmp_path: Path) -> None:
    train = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-7,
        "early_stopping": {"enabled": True, "patience": 2, "min_delta": 0.01},
    }
    settings = bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train=train)
    loop = bench.make_loop(settings)
    loop.fit()
    assert loop.progress.global_step == 3
    again = bench.make_loop(settings)
    again.fit(loop.checkpoints.run.checkpoints()[-1])
    assert again.progress.global_step == 3


def test_a_run_without_progress_continues_and_one_that_overfits_ends(tiny_qwen2: Path, tmp_path: Path) -> None:
    train = {"eval_strategy": "epoch", "save_strategy": "epoch", "epochs": 12, "learning_rate": 1e-7}
    still = bench.make_loop(bench.config(tiny_qwen2, tmp_path / "outputs" / "still", train=train))
    still.fit()
    assert still.progress.global_step == still.schedule.total_steps == 36
    full = {"train": {**train, "learning_rate": 1e-2}, "tuning": {"mode": "full"}}
    settings = bench.config(tiny_qwen2, tmp_path / "outputs" / "overfitting", **full)
    overfitting = bench.make_loop(settings, rows=4)
    overfitting.fit()
    seen = [entry for entry in overfitting.progress.log_history if "eval_loss" in entry]
    best = min(seen, key=lambda entry: entry["eval_loss"])
    assert 4 <= overfitting.progress.global_step < 12
    assert seen[-1]["eval_loss"] > best["eval_loss"] + 0.01
    again = bench.make_loop(settings, rows=4)
    again.fit(overfitting.checkpoints.run.checkpoints()[-1])
    assert again.progress.global_step == overfitting.progress.global_step
