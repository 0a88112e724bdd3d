"""Elastic weight consolidation against its definition, written out with autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.step.batch import Collator
from sft.step.ewc import Consolidation, squared_gradients
from sft.step.step import StepConfig, forward_backward
from tests.step import models


def log_likelihood(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """Of a row's labelled tokens, after their prompt."""
    scores = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
    labels = row["labels"]
    return sum((scores[at - 1, labels[at]] for at in range(1, len(labels)) if labels[at] != -100), torch.zeros(()))


def joined(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def defined_fisher(model: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for row in rows:
        value = log_likelihood(model, row)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += 0 if gradient is None else gradient**2
    return sums


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_fisher_information_is_the_squared_gradient_of_each_rows_likelihood(
    tiny_qwen2: Path, dtype: torch.dtype, limit: float
) -> None:
    rows, model = models.rows(), models.load(tiny_qwen2, dtype=dtype)
    expected = defined_fisher(models.load(tiny_qwen2, attn="sdpa"), rows)
    config = StepConfig(packed=True, label_smoothing=0.2, logits_tile=16)  # smoothing is of training alone
    sums, labels = squared_gradients(model, rows, config)
    assert labels == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert sums.keys() == expected.keys() and models.relative(joined(sums), joined(expected)) < limit
    halves = [squared_gradients(model, half, config)[0] for half in (rows[::2], rows[1::2])]  # ranks add up theirs
    assert models.relative(joined(halves[0]) + joined(halves[1]), joined(sums)) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_penalty_and_its_gradient_are_those_of_the_definition(tiny_qwen2: Path, scale: float) -> None:
    model = models.load(tiny_qwen2)
    drawn = torch.Generator().manual_seed(0)
    fisher = {
        name: torch.rand(weight.shape, generator=drawn, dtype=weight.dtype) for name, weight in model.named_parameters()
    }
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ewc = Consolidation.around(model, fisher, 3.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=drawn, dtype=weight.dtype), alpha=0.01)
    moved = zip(fisher.values(), model.parameters(), base.values(), strict=True)
    expected = 3.0 / 2 * sum((f * (weight - start) ** 2).sum() for f, weight, start in moved)
    loss, *_ = forward_backward(model, models.batch(), StepConfig(packed=True))
    task = models.gradients(model)
    expected.backward()
    pull = models.gradients(model)
    for config in (StepConfig(packed=True), StepConfig(max_rows=1)):  # one micro-batch, or eight
        again, *_ = forward_backward(
            model,
            models.batch(),
            config,
            backward=lambda one: (one * scale).backward(),  # type: ignore[no-untyped-call]
        )
        assert float(ewc.add_gradients(scale)) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert float(again) == pytest.approx(float(loss), rel=1e-9)
        assert models.relative(models.gradients(model) / scale, task + pull) < 1e-9


def test_what_is_not_trained_has_no_penalty(tiny_qwen2: Path) -> None:
    model = models.load(tiny_qwen2)
    model.get_input_embeddings().weight.requires_grad = False
    sums, _ = squared_gradients(model, models.rows(), StepConfig())
    assert sums.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    ewc = Consolidation.around(model, sums, 1.0)
    assert float(ewc.add_gradients()) == 0.0  # no weight has a gradient
    batch = Collator()(models.rows())
    forward_backward(model, batch, StepConfig())
    before = models.gradients(model)
    forward_backward(model, batch, StepConfig())
    assert float(ewc.add_gradients()) == 0.0  # nothing has moved
    assert torch.equal(models.gradients(model), before)
