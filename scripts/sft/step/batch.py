"""The step batch (all rows of one optimizer step, stored flat) and its split into micro-batches.

A causal batch is `{"input_ids": [T], "labels": [T], "lengths": [R]}`, a seq2seq one `{"source_ids": [S],
"source_lengths": [R], "labels": [T], "lengths": [R]}`: R rows end to end. The first label of a causal row is masked,
because no token precedes it; so the number of labels other than -100 is the number of losses.
`split_micro_batches` decides how many tokens are computed at a time; it never changes the step's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
# The cost of one more micro-batch, in tokens of compute, where a finer split would save padding: kernel launches and
# 4-bit weights dequantised once more. About 130 tokens on a fast GPU, a third of that on the older ones that cannot
# pack, almost nothing on a CPU. With it 91 % of what is computed for Alpaca's rows, 16 a step, is real
# (benchmarks/packing.py).
MICRO_BATCH_COST = 48

Kind = Literal["causal", "seq2seq"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    inputs: the model's keyword arguments, [1, T] with restarting `position_ids`, or [B, L] padded on the right.
    targets: the token that each position predicts, IGNORED where no loss is taken; [1, T] or [B, L].
    rows: indices of its rows in the step batch. computed: tokens, padding included. labelled: number of losses.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    rows: tuple[int, ...]
    computed: int
    labelled: int
    seq2seq: bool = field(default=False)

    @property
    def packed(self) -> bool:
        """Whether its rows share one sequence without padding."""
        return "position_ids" in self.inputs


class Collator:
    """Collates rows `{"input_ids": [...], "labels": [...]}` into one flat step batch; ignores other keys."""

    def __init__(self, kind: Kind = "causal") -> None:
        self.kind = kind

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The step batch of these rows, in their order. Raises ValueError where tokens and labels differ in number."""
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


def count_labels(batch: Batch) -> int:
    """The number of losses in the batch, by which its gradient is divided."""
    return int((batch["labels"] != IGNORED).sum())


def split_micro_batches(batch: Batch, *, tokens: int, rows: int | None = None, packed: bool) -> list[MicroBatch]:
    """Splits the batch into micro-batches of at most `tokens` computed tokens and `rows` rows, each row in exactly one.

    packed: without padding, for a model whose attention keeps rows apart; else groups of similar length, padded on the
    right, where padding counts as tokens. A row longer than the budget gets a micro-batch of its own. Deterministic.
    """
    lengths = batch["lengths"].tolist()
    most_rows = rows or len(lengths)
    if "source_ids" in batch:
        sources = batch["source_lengths"].tolist()
        groups = _group_by_length(list(zip(sources, lengths, strict=True)), tokens, most_rows)
        return [_seq2seq_micro_batch(batch, sources, lengths, group) for group in groups]
    if packed:
        return [_packed_micro_batch(batch, lengths, group) for group in _best_fit(lengths, tokens, most_rows)]
    groups = _group_by_length([(length, 0) for length in lengths], tokens, most_rows)
    return [_padded_micro_batch(batch, lengths, group) for group in groups]


def row_indices(micro: MicroBatch, batch: Batch) -> Tensor:
    """For each position of `micro.targets` the index of its row in the step batch, in the shape of `targets`."""
    rows = torch.tensor(micro.rows, device=micro.targets.device)
    if micro.packed:
        return rows.repeat_interleave(batch["lengths"].to(rows.device)[rows])[None]
    return rows[:, None].expand_as(micro.targets)


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


def _best_fit(lengths: Sequence[int], tokens: int, most_rows: int) -> list[list[int]]:
    """Best-fit decreasing: longest row first, each into the fullest bin that it still fits into."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        open_bins = [b for b in range(len(bins)) if free[b] >= lengths[index] and len(bins[b]) < most_rows]
        if open_bins:
            best = min(open_bins, key=lambda b: (free[b], b))
            bins[best].append(index)
            free[best] -= lengths[index]
        else:
            bins.append([index])
            free.append(tokens - lengths[index])
    return [sorted(rows) for rows in bins]


def _group_by_length(sizes: Sequence[tuple[int, int]], tokens: int, most_rows: int) -> list[list[int]]:
    """The cheapest split of the rows, sorted by size, into groups: padded tokens plus MICRO_BATCH_COST a group.

    Dynamic programming over the sorted rows: `best[j]` is the least cost of the first j.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], -sizes[i][1], i))
    best: list[float] = [0.0] + [float("inf")] * len(order)
    start = [0] * (len(order) + 1)
    for first in range(len(order)):
        longest_source = longest_target = 0
        for last in range(first, min(len(order), first + most_rows)):
            longest_source = max(longest_source, sizes[order[last]][0])
            longest_target = max(longest_target, sizes[order[last]][1])
            computed = (longest_source + longest_target) * (last - first + 1)
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


def _select(flat: Tensor, lengths: Sequence[int], group: Sequence[int]) -> list[Tensor]:
    """The rows of `group` out of a flat tensor."""
    rows = torch.split(flat, list(lengths))
    return [rows[index] for index in group]


def _shift_left(labels: Tensor) -> Tensor:
    """Labels of a causal row [L], moved to the position that predicts them."""
    return torch.cat([labels[1:], labels.new_full((min(1, len(labels)),), IGNORED)])


def _packed_micro_batch(batch: Batch, lengths: Sequence[int], group: list[int]) -> MicroBatch:
    ids = torch.cat(_select(batch["input_ids"], lengths, group))[None]
    targets = torch.cat([_shift_left(row) for row in _select(batch["labels"], lengths, group)])[None]
    positions = torch.cat([torch.arange(lengths[i], device=ids.device) for i in group])[None]
    inputs = {"input_ids": ids, "position_ids": positions}
    return MicroBatch(inputs, targets, tuple(group), ids.numel(), _count(targets))


def _padded_micro_batch(batch: Batch, lengths: Sequence[int], group: list[int]) -> MicroBatch:
    ids, mask = _pad(_select(batch["input_ids"], lengths, group))
    targets = pad_sequence([_shift_left(row) for row in _select(batch["labels"], lengths, group)], True, IGNORED)
    return MicroBatch({"input_ids": ids, "attention_mask": mask}, targets, tuple(group), ids.numel(), _count(targets))


def _seq2seq_micro_batch(batch: Batch, sources: Sequence[int], lengths: Sequence[int], group: list[int]) -> MicroBatch:
    ids, mask = _pad(_select(batch["source_ids"], sources, group))
    targets = pad_sequence(_select(batch["labels"], lengths, group), True, IGNORED)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return MicroBatch(inputs, targets, tuple(group), ids.numel() + targets.numel(), _count(targets), seq2seq=True)


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows padded on the right with token 0 to [B, L], and their attention mask."""
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0)
    return pad_sequence(rows, True, 0), mask


def _count(targets: Tensor) -> int:
    return int((targets != IGNORED).sum())
