"""However a window is cut, and even when memory runs out on the way, the step is the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sft.errors import EnvironmentProblem
from sft.step import step
from sft.step.batch import Collator, count_labels, split_micro_batches
from tests.step import models

CUTS: dict[str, dict[str, Any]] = {
    "1x8": {"tokens": 10_000, "rows": 1, "apart": True},
    "1x8 padded": {"tokens": 10_000, "rows": 1, "apart": False},
    "8x1 packed": {"tokens": 10_000, "rows": None, "apart": True},
    "8x1 padded": {"tokens": 10_000, "rows": None, "apart": False},
    "packed into 20": {"tokens": 20, "rows": None, "apart": True},
    "groups within 20": {"tokens": 20, "rows": 3, "apart": False},
    "asked of the model": {"tokens": 30, "rows": None, "apart": None},
}


def _expected(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of the window, written out a row at a time, and its gradients."""
    total = torch.zeros((), dtype=model.dtype)
    lengths = batch["lengths"].tolist()
    for ids, labels in zip(batch["input_ids"].split(lengths), batch["labels"].split(lengths), strict=True):
        scores = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(labels[1:].tolist()):
            if label != -100:
                total = total - scores[position, label]
    mean = total / count_labels(batch)
    mean.backward()
    return mean.detach(), models.gradients(model)


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_gpt2"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_any_cut_gives_the_gradients_of_the_mean_loss(
    family: str, dtype: torch.dtype, limit: float, request: pytest.FixtureRequest
) -> None:
    model, batch = models.load(request.getfixturevalue(family), dtype=dtype), models.batch()
    loss, gradient = _expected(model, batch)
    for name, settings in CUTS.items():
        for logits in ("chunked", "full"):
            found = step.backward_window(model, batch, logits=logits, tile=8, **settings)  # type: ignore[arg-type]
            assert found.dtype == dtype
            assert float((found - loss).abs() / loss) < limit, name
            assert models.relative(models.gradients(model), gradient) < limit, name


def test_any_cut_of_a_seq2seq_window_too(tiny_t5: Path) -> None:
    model = models.load(tiny_t5, attn="sdpa", seq2seq=True)
    batch = Collator("seq2seq")(models.seq2seq_rows())
    found = []
    for tokens, rows in ((10_000, 1), (10_000, None), (25, None)):
        loss = step.backward_window(model, batch, tokens=tokens, rows=rows)
        found.append((float(loss), models.gradients(model)))
    assert all(abs(loss - found[0][0]) < 1e-12 for loss, _ in found)
    assert all(models.relative(gradient, found[0][1]) < 1e-9 for _, gradient in found)
    ids, labels = batch["source_ids"].split(batch["source_lengths"].tolist()), batch["labels"]
    total = sum(
        float(model(input_ids=source[None], labels=target[None]).loss) * len(target)
        for source, target in zip(ids, labels.split(batch["lengths"].tolist()), strict=True)
    )
    assert abs(total / count_labels(batch) - found[0][0]) < 1e-6  # transformers' own loss, in fp32


def test_the_normaliser_may_count_more_than_this_window(tiny_qwen2: Path) -> None:
    model, batch = models.load(tiny_qwen2), models.batch()
    mine = step.backward_window(model, batch, tokens=64)
    gradient = models.gradients(model)
    doubled = step.backward_window(model, batch, tokens=64, normaliser=torch.tensor(2 * count_labels(batch)))
    assert float(mine) == pytest.approx(2 * float(doubled), rel=1e-12)
    assert models.relative(2 * models.gradients(model), gradient) < 1e-12


def test_a_window_without_a_label_is_a_step_of_nothing(tiny_qwen2: Path) -> None:
    model = models.load(tiny_qwen2)
    batch = Collator("causal")([{"input_ids": [4, 5, 6], "labels": [-100] * 3}])
    (micro,) = split_micro_batches(batch, tokens=64, apart=True)
    for logits in ("chunked", "full"):
        loss, count = step.loss_sum(model, micro, logits=logits)  # type: ignore[arg-type]
        assert (float(loss), count) == (0.0, 0)
        loss.backward()
        assert float(models.gradients(model).norm()) == 0
    assert float(step.backward_window(model, batch, tokens=64)) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_takes_the_same_sum_without_gradients(tiny_qwen2: Path) -> None:
    model = models.load(tiny_qwen2).eval()
    (micro,) = split_micro_batches(models.batch(), tokens=10_000, apart=True)
    with torch.no_grad():
        evaluated, count = step.loss_sum(model, micro, tile=5)
    learnt, _ = step.loss_sum(model, micro, tile=5)
    assert not evaluated.requires_grad
    assert count == count_labels(models.batch())
    assert float(evaluated) == pytest.approx(float(learnt), rel=1e-12)


class Ceiling:
    """Runs out of memory, as the allocator does, when a forward pass has more tokens than `limit`, or at one moment."""

    def __init__(self, model: Any, limit: int, *, layer: int = 0, backward: bool = False) -> None:
        self.limit, self.tokens, self.failed = limit, 0, 0
        model.get_input_embeddings().register_forward_hook(self.see)
        block = model.model.layers[layer]
        if backward:
            block.register_full_backward_hook(lambda *_: self.check())
        else:
            block.register_forward_hook(lambda *_: self.check())

    def see(self, _: Any, args: Any, __: Any) -> None:
        self.tokens = args[0].numel()

    def check(self) -> None:
        if self.tokens > self.limit:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_is_rolled_back_and_the_same_rows_replayed(
    tiny_qwen2: Path, apart: bool, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = models.load(tiny_qwen2), models.batch()
    loss, gradient = _expected(model, batch)
    ceiling, budgets = Ceiling(model, 18, layer=1, backward=backward), []
    found = step.backward_window(model, batch, tokens=4096, apart=apart, on_budget=budgets.append)
    assert ceiling.failed == len(budgets) > 0
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] <= 36
    assert f"at most {budgets[-1]} tokens" in caplog.text
    assert float((found - loss).abs() / loss) < 1e-9
    assert models.relative(models.gradients(model), gradient) < 1e-9


def test_the_random_state_is_put_back_before_the_replay(tiny_qwen2: Path) -> None:
    model = get_peft_model(models.load(tiny_qwen2), LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"]))
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.normal_()
    batch = models.batch()
    torch.manual_seed(1)
    step.backward_window(model, batch, tokens=12, rows=2, apart=True)
    clean = models.gradients(model)
    ceiling, budgets = Ceiling(model.get_base_model(), 20, layer=1), []
    torch.manual_seed(1)
    step.backward_window(model, batch, tokens=33, rows=2, apart=True, on_budget=budgets.append)
    assert (ceiling.failed, budgets) == (1, [12])
    assert torch.equal(models.gradients(model), clean)


def test_a_row_that_does_not_fit_alone_is_said_with_a_fix(tiny_qwen2: Path) -> None:
    model = models.load(tiny_qwen2)
    Ceiling(model, 12)
    with pytest.raises(EnvironmentProblem, match="single row of 14 tokens") as caught:
        step.backward_window(model, models.batch(), tokens=4096)
    assert "max_seq_len" in str(caught.value)


def test_other_errors_are_not_taken_for_memory(tiny_qwen2: Path) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    model = models.load(tiny_qwen2)
    model.model.layers[0].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        step.backward_window(model, models.batch(), tokens=64)
    assert step.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))


def test_a_real_4_bit_base_trains_its_adapters_and_stays_as_it_was(tiny_qwen2: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from sft.step import attention

    attention.register()
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_qwen2, quantization_config=settings, dtype=torch.float32, attn_implementation=attention.NAME
    )
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    before = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    batch, found = models.batch(), []
    for settings_of_cut in (CUTS["1x8"], CUTS["8x1 packed"], CUTS["groups within 20"]):
        step.backward_window(model, batch, tile=8, **settings_of_cut)
        found.append(models.gradients(model))
    assert float(found[0].norm()) > 0
    assert all(models.relative(gradient, found[0]) < 1e-5 for gradient in found)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(float(step.backward_window(model, batch, tokens=64)))
        optimizer.step()
        model.zero_grad(set_to_none=True)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
