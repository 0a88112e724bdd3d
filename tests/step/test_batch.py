"""Rows are stored flat and split into micro-batches that hold each of them exactly once."""

from __future__ import annotations

import pytest
import torch

from sft.step.batch import Collator, count_labels, split_micro_batches
from tests.step import models

ROWS = [
    {"id": "a", "input_ids": [5, 6, 7], "labels": [5, 6, 7]},
    {"id": "b", "input_ids": [8, 9], "labels": [-100, 9]},
    {"id": "c", "input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
]
PAIRS = [{"input_ids": [4, 5, 1], "labels": [7, 1]}, {"input_ids": [6, 1], "labels": [8, 9, 1]}]


def test_a_step_batch_is_flat_and_each_first_label_is_masked() -> None:
    batch = Collator()(ROWS)
    assert batch["input_ids"].tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert batch["labels"].tolist() == [-100, 6, 7, -100, 9, -100, -100, 3, 4]
    assert batch["lengths"].tolist() == [3, 2, 4]
    assert count_labels(batch) == 5
    assert ROWS[0]["labels"] == [5, 6, 7]  # the caller's row is as it was


def test_a_seq2seq_batch_carries_two_lengths_and_masks_nothing() -> None:
    batch = Collator("seq2seq")(
        [{"input_ids": [4, 5, 1], "labels": [7, 1]}, {"input_ids": [6, 1], "labels": [8, 9, 1]}]
    )
    assert {name: value.tolist() for name, value in batch.items()} == {
        "source_ids": [4, 5, 1, 6, 1],
        "source_lengths": [3, 2],
        "labels": [7, 1, 8, 9, 1],
        "lengths": [2, 3],
    }
    assert count_labels(batch) == 5


def test_a_row_with_too_few_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens and 2 labels"):
        Collator()([{"input_ids": [1, 2, 3], "labels": [1, 2]}])


def test_rows_kept_apart_are_packed_without_padding_and_positions_restart() -> None:
    micros = split_micro_batches(Collator()(ROWS), tokens=6, rows=None, packed=True)
    assert [micro.rows for micro in micros] == [(1, 2), (0,)]
    first = micros[0]
    assert first.inputs["input_ids"].tolist() == [[8, 9, 1, 2, 3, 4]]
    assert first.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]]
    assert first.targets.tolist() == [[9, -100, -100, 3, 4, -100]]
    assert "attention_mask" not in first.inputs
    assert (first.computed, first.labelled) == (6, 3)


def test_groups_of_similar_length_are_padded_on_the_right() -> None:
    (micro,) = split_micro_batches(Collator()(ROWS), tokens=12, rows=None, packed=False)
    assert micro.rows == (0, 1, 2)
    assert micro.inputs["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [1, 2, 3, 4]]
    assert micro.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert micro.targets.tolist() == [[6, 7, -100, -100], [9, -100, -100, -100], [-100, 3, 4, -100]]
    assert micro.computed == 12


def test_the_budget_counts_padding_and_the_cap_counts_rows() -> None:
    assert [micro.rows for micro in split_micro_batches(Collator()(ROWS), tokens=8, rows=None, packed=False)] == [
        (2,),
        (0, 1),
    ]
    assert [micro.rows for micro in split_micro_batches(Collator()(ROWS), tokens=100, rows=1, packed=True)] == [
        (2,),
        (0,),
        (1,),
    ]


def test_a_row_longer_than_the_budget_gets_a_micro_batch_of_its_own() -> None:
    for packed in (True, False):
        micros = split_micro_batches(Collator()(ROWS), tokens=3, rows=None, packed=packed)
        assert sorted(micro.rows for micro in micros) == [(0,), (1,), (2,)]


def test_a_seq2seq_group_pads_both_sides_and_budgets_their_sum() -> None:
    batch = Collator("seq2seq")(
        [{"input_ids": [4, 5, 1], "labels": [7, 1]}, {"input_ids": [6, 1], "labels": [8, 9, 1]}]
    )
    (micro,) = split_micro_batches(batch, tokens=12, packed=False)
    assert micro.computed == 12
    assert micro.inputs["input_ids"].tolist() == [[4, 5, 1], [6, 1, 0]]
    assert micro.targets.tolist() == [[7, 1, -100], [8, 9, 1]]
    assert len(split_micro_batches(batch, tokens=11, packed=False)) == 2


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 16, 40, 1000])
@pytest.mark.parametrize("cap", [None, 1, 3])
def test_any_split_holds_every_row_and_label_once(packed: bool, tokens: int, cap: int | None) -> None:
    lengths = tuple(int(n) for n in torch.randint(1, 40, (33,), generator=torch.Generator().manual_seed(tokens)))
    batch = models.batch(lengths)
    micros = split_micro_batches(batch, tokens=tokens, rows=cap, packed=packed)
    assert sorted(row for micro in micros for row in micro.rows) == list(range(33))
    assert sum(micro.labelled for micro in micros) == count_labels(batch)
    assert all(micro.computed <= tokens or len(micro.rows) == 1 for micro in micros)
    assert all(len(micro.rows) <= (cap or 33) for micro in micros)
    again = split_micro_batches(batch, tokens=tokens, rows=cap, packed=packed)
    assert [micro.rows for micro in again] == [micro.rows for micro in micros]


def test_packing_fills_the_budget_and_groups_stay_tight() -> None:
    lengths = tuple(int(n) for n in torch.randint(20, 400, (64,), generator=torch.Generator().manual_seed(1)))
    batch = models.batch(lengths)
    packed = split_micro_batches(batch, tokens=2048, packed=True)
    assert sum(lengths) / (2048 * len(packed)) > 0.85
    assert len(packed) == -(-sum(lengths) // 2048)  # no split has fewer
    grouped = split_micro_batches(batch, tokens=2048, packed=False)
    assert sum(lengths) / sum(micro.computed for micro in grouped) > 0.9


def test_a_step_batch_survives_the_data_loader_pinning_and_accelerate() -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    loader = Accelerator(cpu=True).prepare(DataLoader(models.rows(), batch_size=4, collate_fn=Collator("causal")))
    sizes = [batch["lengths"].tolist() for batch in loader]
    assert sizes == [list(models.LENGTHS[:4]), list(models.LENGTHS[4:])]
