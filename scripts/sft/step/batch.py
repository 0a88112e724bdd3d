"""The window: all rows of one optimizer step, travelling flat, and its cut into micro-batches.

A causal window is `{"input_ids": [T], "labels": [T], "lengths": [R]}`, a seq2seq one `{"source_ids": [S],
"source_lengths": [R], "labels": [T], "lengths": [R]}`: R rows end to end. In a causal row the first label is masked,
for nothing comes before it to predict it from; so the labels that are not -100 are as many as the losses taken.
`cut` never changes what the step is, only how many tokens are computed at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
# What one more micro-batch costs, in tokens of compute, when a finer cut would save padding: kernels launched and
# 4-bit weights dequantised once again: about 130 tokens on a fast card, a third of that on the older ones that cannot
# pack, near nothing on a CPU. Alpaca's rows, 16 a step, are then 91 % of what is computed (benchmarks/packing.py).
MICRO_BATCH_COST = 48

Kind = Literal["causal", "seq2seq"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    inputs: the model's keyword arguments, [1, T] with restarting `position_ids`, or [B, L] padded on the right.
    targets: for each position the token that it is to predict, IGNORED where no loss is taken; [1, T] or [B, L].
    rows: which rows of the window these are. computed: tokens, padding included. labelled: losses taken.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    rows: tuple[int, ...]
    computed: int
    labelled: int
    seq2seq: bool = field(default=False)


class Collator:
    """Rows `{"input_ids": [...], "labels": [...]}` to one flat window; any other key of a row is left behind."""

    def __init__(self, kind: Kind = "causal") -> None:
        self.kind = kind

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [list(feature["input_ids"]) for feature in features]
        labels = [list(feature["labels"]) for feature in features]
        if self.kind == "seq2seq":
            return {
                "source_ids": _flat(ids),
                "source_lengths": torch.tensor([len(row) for row in ids]),
                "labels": _flat(labels),
                "lengths": torch.tensor([len(row) for row in labels]),
            }
        for row, label in zip(ids, labels, strict=True):
            if len(row) != len(label):
                raise ValueError(f"a row has {len(row)} tokens and {len(label)} labels")
            label[:1] = [IGNORED] * len(label[:1])
        return {
            "input_ids": _flat(ids),
            "labels": _flat(labels),
            "lengths": torch.tensor([len(row) for row in ids]),
        }


def collate(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The causal window of these rows."""
    return Collator("causal")(features)


def count_labels(batch: Batch) -> int:
    """How many losses the window takes: what its gradient is divided by."""
    return int((batch["labels"] != IGNORED).sum())


def split_micro_batches(batch: Batch, *, tokens: int, rows: int | None = None, apart: bool) -> list[MicroBatch]:
    """The window as micro-batches of at most `tokens` computed tokens and `rows` rows, each row in exactly one.

    apart: padding-free, for a model whose attention keeps rows apart; else groups of like length padded on the right,
    the padding counted. A row that is longer than the budget stands alone. The same window is always cut the same way.
    """
    lengths = batch["lengths"].tolist()
    cap = rows or len(lengths)
    if "source_ids" in batch:
        sources = batch["source_lengths"].tolist()
        groups = _like_length(list(zip(sources, lengths, strict=True)), tokens, cap)
        return [_seq2seq(batch, sources, lengths, group) for group in groups]
    if apart:
        return [_packed(batch, lengths, group) for group in _best_fit(lengths, tokens, cap)]
    return [_padded(batch, lengths, group) for group in _like_length([(n, 0) for n in lengths], tokens, cap)]


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


def _best_fit(lengths: Sequence[int], tokens: int, cap: int) -> list[list[int]]:
    """Best-fit decreasing: the longest row first, each into the fullest bin that still has room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        open_bins = [b for b in range(len(bins)) if room[b] >= lengths[index] and len(bins[b]) < cap]
        if open_bins:
            best = min(open_bins, key=lambda b: (room[b], b))
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(tokens - lengths[index])
    return [sorted(found) for found in bins]


def _like_length(sizes: Sequence[tuple[int, int]], tokens: int, cap: int) -> list[list[int]]:
    """The cheapest cut of the rows, sorted by size, into groups: padded tokens plus MICRO_BATCH_COST a group.

    By dynamic programming over the sorted rows: `best[j]` is the least cost of the first j.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1], i))
    best: list[float] = [0.0] + [float("inf")] * len(order)
    start = [0] * (len(order) + 1)
    for first in range(len(order)):
        width = widest = 0
        for last in range(first, min(len(order), first + cap)):
            width = max(width, sizes[order[last]][0])
            widest = max(widest, sizes[order[last]][1])
            computed = (width + widest) * (last - first + 1)
            if computed > tokens and last > first:
                break
            cost = best[first] + computed + MICRO_BATCH_COST
            if cost < best[last + 1]:
                best[last + 1], start[last + 1] = cost, first
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[start[end] : end]))
        end = start[end]
    return groups[::-1]


def _rows_of(flat: Tensor, lengths: Sequence[int], wanted: Sequence[int]) -> list[Tensor]:
    every = torch.split(flat, list(lengths))
    return [every[index] for index in wanted]


def _ahead(labels: Tensor) -> Tensor:
    """Labels of a causal row, moved to the position that predicts them."""
    return torch.cat([labels[1:], labels.new_full((min(1, len(labels)),), IGNORED)])


def _packed(batch: Batch, lengths: Sequence[int], group: list[int]) -> MicroBatch:
    ids = torch.cat(_rows_of(batch["input_ids"], lengths, group))[None]
    targets = torch.cat([_ahead(row) for row in _rows_of(batch["labels"], lengths, group)])[None]
    positions = torch.cat([torch.arange(lengths[i], device=ids.device) for i in group])[None]
    inputs = {"input_ids": ids, "position_ids": positions}
    return MicroBatch(inputs, targets, tuple(group), ids.numel(), _count(targets))


def _padded(batch: Batch, lengths: Sequence[int], group: list[int]) -> MicroBatch:
    ids, mask = _pad(_rows_of(batch["input_ids"], lengths, group))
    targets = pad_sequence([_ahead(row) for row in _rows_of(batch["labels"], lengths, group)], True, IGNORED)
    return MicroBatch({"input_ids": ids, "attention_mask": mask}, targets, tuple(group), ids.numel(), _count(targets))


def _seq2seq(batch: Batch, sources: Sequence[int], lengths: Sequence[int], group: list[int]) -> MicroBatch:
    ids, mask = _pad(_rows_of(batch["source_ids"], sources, group))
    targets = pad_sequence(_rows_of(batch["labels"], lengths, group), True, IGNORED)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return MicroBatch(inputs, targets, tuple(group), ids.numel() + targets.numel(), _count(targets), seq2seq=True)


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0)
    return pad_sequence(rows, True, 0), mask


def _count(targets: Tensor) -> int:
    return int((targets != IGNORED).sum())
