"""The loop on real tiny models: every mode trains, the numbers are the window's, faults are named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sft.errors import RunError
from tests.training import bench


def base_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def logged(trainer: bench.WindowTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_qlora_trains_on_a_real_4_bit_base_that_stays_bit_identical(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": "qlora"}))
    types = {type(module).__name__ for module in trainer.model.modules()}
    before, adapters = base_bytes(trainer.model), bench.trained(trainer)
    trainer.fit(None)
    assert "Linear4bit" in types
    assert base_bytes(trainer.model) == before
    changed = [name for name, weight in bench.trained(trainer).items() if not torch.equal(weight, adapters[name])]
    assert len(changed) == len(adapters) and all("lora_" in name for name in changed)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_loss_falls_and_only_what_should_change_changes(tiny_qwen2: Path, tmp_path: Path, mode: str) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": mode}))
    before, start = base_bytes(trainer.model), bench.trained(trainer)
    trainer.fit(None)
    assert base_bytes(trainer.model) == before
    assert not any(
        torch.equal(weight, start[name]) for name, weight in bench.trained(trainer).items() if "norm" not in name
    )
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    assert (len(before) == 0) == (mode == "full")


def test_the_share_of_time_spent_waiting_for_input_is_in_the_log(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"))
    trainer.fit(None)
    shares = logged(trainer, "input_wait")
    assert len(shares) == len(logged(trainer, "loss")) > 0
    assert all(0 < share < 1 for share in shares)


def test_a_tiny_gpt2_trains_in_lora_mode(tiny_gpt2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_gpt2, tmp_path / "outputs" / "a"))
    trainer.fit(None)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def test_bf16_trains_adapters_in_fp32_over_a_16_bit_base(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", train={"bf16": True}))
    kinds = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    trainer.fit(None)
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def test_full_mode_under_bf16_keeps_fp32_weights(tiny_qwen2: Path, tmp_path: Path) -> None:
    made = {"tuning": {"mode": "full"}, "train": {"bf16": True}}
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a", **made))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.fit(None)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def plain_mean_loss(trainer: bench.WindowTrainer, rows: list[dict]) -> float:
    """The mean over labelled tokens, one row at a time, by nothing of ours."""
    total = count = 0.0
    trainer.model.eval()
    for row in rows:
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        wanted = torch.tensor(row["labels"][1:])
        total += float(functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100))
        count += int((wanted != -100).sum())
    return total / count


def test_eval_loss_is_the_exact_mean_over_labelled_tokens(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"), validation=7)
    metrics = trainer.evaluate()
    expected = plain_mean_loss(trainer, bench.features(7, seed=1))
    assert abs(metrics["eval_loss"] - expected) < 1e-5
    assert abs(metrics["eval_perplexity"] - math.exp(expected)) < 1e-2


def test_the_logged_loss_is_the_windows_mean_however_it_is_cut(tiny_qwen2: Path, tmp_path: Path) -> None:
    lora = {"mode": "lora", "lora": {"dropout": 0.0}}
    losses = []
    for name, budget in (("a", 4096), ("b", 24)):
        train = {"effective_batch": 10, "max_steps": 3, "micro_batch_tokens": budget}
        trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / name, tuning=lora, train=train))
        expected = plain_mean_loss(trainer, bench.features(10))
        trainer.fit(None)
        losses.append(logged(trainer, "loss"))
        assert abs(losses[-1][0] - expected) < 1e-5
    assert all(abs(one - other) < 1e-5 for one, other in zip(*losses, strict=True))


def test_each_epoch_takes_every_row_once(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"))
    loader = trainer.get_train_dataloader()
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append([name for batch in loader for name in batch["ids"]])
    assert [len(batch["ids"]) for batch in loader] == [4, 4, 2]
    assert all(sorted(order) == sorted(f"row-{i}" for i in range(10)) for order in orders)
    assert orders[0] != orders[1]


def test_a_loss_that_is_not_finite_names_the_rows_of_the_step(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "a"))
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(RunError, match="the loss is nan at step 1") as caught:
        trainer.fit(None)
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
    trainer = bench.trainer(settings)
    trainer.fit(None)
    assert trainer.state.global_step == 3
    again = bench.trainer(settings)
    again.fit(trainer.keeper.run.checkpoints()[-1])
    assert again.state.global_step == 3


def test_a_run_that_only_stands_still_goes_on_and_one_that_learns_by_heart_ends(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    train = {"eval_strategy": "epoch", "save_strategy": "epoch", "epochs": 12, "learning_rate": 1e-7}
    still = bench.trainer(bench.config(tiny_qwen2, tmp_path / "outputs" / "still", train=train))
    still.fit(None)
    assert still.state.global_step == still.flow.plan.total_steps == 36
    full = {"train": {**train, "learning_rate": 1e-2}, "tuning": {"mode": "full"}}
    settings = bench.config(tiny_qwen2, tmp_path / "outputs" / "heart", **full)
    heart = bench.trainer(settings, rows=4)
    heart.fit(None)
    seen = [entry for entry in heart.state.log_history if "eval_loss" in entry]
    best = min(seen, key=lambda entry: entry["eval_loss"])
    assert 4 <= heart.state.global_step < 12
    assert seen[-1]["eval_loss"] > best["eval_loss"] + 0.01
    again = bench.trainer(settings, rows=4)
    again.fit(heart.keeper.run.checkpoints()[-1])
    assert again.state.global_step == heart.state.global_step
