"""Packing inside the step batch: nearly all computed tokens are real, and no row affects another."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from benchmarks import flops, material, packing

from sft.step import step
from sft.step.batch import Collator, count_labels, split_micro_batches
from tests.step import models

BUDGET = 2048


def test_most_computed_tokens_are_real_at_alpacas_lengths() -> None:
    rows = material.generated_rows(800, longest=BUDGET, vocabulary=1000)
    packed = packing.measure(rows, budget=BUDGET, effective=16, packed=True)
    groups = packing.measure(rows, budget=BUDGET, effective=16, packed=False)
    assert packed["real_of_computed"] == 1.0
    assert packed["micro_batches"] == packed["fewest_possible"]
    assert groups["real_of_computed"] >= 0.90
    larger = packing.measure(rows, budget=BUDGET, effective=256, packed=True)
    assert larger["real_of_budget"] >= 0.90


def test_rows_of_a_real_data_set_too(shared: Path) -> None:
    files = (shared / "instruct" / "alpaca_52k.json", shared / "tokenizers" / "qwen2.5" / "tokenizer.json")
    rows = material.alpaca(*files, longest=BUDGET, most=800)
    assert packing.measure(rows, budget=BUDGET, effective=16, packed=True)["real_of_computed"] >= 0.95
    assert packing.measure(rows, budget=BUDGET, effective=16, packed=False)["real_of_computed"] >= 0.90


def test_bins_are_filled_best_fit_first() -> None:
    lengths = (60, 50, 40, 30, 20)
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in lengths]
    groups = [micro.rows for micro in split_micro_batches(Collator("causal")(rows), tokens=100, packed=True)]
    assert groups == [(0, 2), (1, 3, 4)]


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_gpt2"])
def test_each_packed_rows_loss_and_gradient_are_those_of_the_row_alone(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = models.load(request.getfixturevalue(family), dtype=torch.float32)
    rows = models.rows((9, 3, 14, 5, 21, 11))
    random.Random(0).shuffle(rows)
    (packed,) = split_micro_batches(Collator("causal")([dict(row) for row in rows]), tokens=4096, packed=True)
    lengths = [len(row["input_ids"]) for row in rows]
    for index, row in enumerate(rows):
        batch = Collator("causal")([dict(row)])
        if not count_labels(batch):
            continue
        alone = step.forward_backward(model, batch, step.StepConfig(micro_batch_tokens=64), normalizer=1).loss
        expected = models.gradients(model)
        only = torch.full_like(packed.targets, -100)
        here = slice(sum(lengths[:index]), sum(lengths[: index + 1]))
        only[:, here] = packed.targets[:, here]
        mine = step.MicroBatch(packed.inputs, only, packed.rows, packed.computed, count_labels(batch))
        losses = step.token_losses(model, mine, step.StepConfig())
        loss = losses.sum()
        loss.backward()
        assert len(losses) == count_labels(batch)
        assert float((loss.detach() - alone).abs() / alone) < 1e-5
        assert models.relative(models.gradients(model), expected) < 1e-5


def test_no_mode_does_more_operations_than_its_formula() -> None:
    shapes = {
        "vocab_size": 2000,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    modes = [(True, False, True), (True, True, True), (True, True, False), (False, True, True)]
    modes_measured = flops.measure(
        material.generated_rows(6, longest=128, vocabulary=2000), shapes, tokens=256, modes=modes
    )
    assert len(modes_measured) == len(modes)
    assert all(0.9 < mode["ratio"] <= 1.03 for mode in modes_measured), modes_measured
