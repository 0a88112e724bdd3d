"""The step batch (all rows of one optimizer step, stored flat) and its split into micro-batches.

A causal batch is `{"input_ids": [T], "labels": [T], "lengths": [R]}`, a seq2seq one `{"source_ids": [S],
"source_lengths": [R], "labels": [T], "lengths": [R]}`: R rows end to end. The first label of a causal row is masked,
because no token precedes it; so the number of labels other than -100 is the number of losses. Either may have
`"weights": [T]`, fp32: how much the loss of each label counts; without them each counts 1.
For preferences (`step/preferences.py`) it has `"ratings"`. Zeros, [R / 2]: rows 2i and 2i + 1 are a chosen and a
rejected answer, which are never parted, count as one row wherever rows are limited, and have one loss. 1 for a good and
-1 for a bad answer, [R]: each row has one loss, and under `other_...` is a second batch, of other rows' answers to its
prompts.
`split_micro_batches` decides how many tokens are computed at a time; it never changes the step's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
# The cost of one more micro-batch, in tokens of compute, where a finer split would save padding: kernel launches and
# 4-bit weights dequantised once more. About 130 tokens on a fast GPU, a third of that on the older ones that cannot
# pack, almost nothing on a CPU (benchmarks/packing.py).
MICRO_BATCH_COST = 48

Kind = Literal["causal", "seq2seq"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    inputs: the model's keyword arguments, [1, T] with restarting `position_ids`, or [B, L] padded on the right.
    targets: the token that each position predicts, IGNORED where no loss is taken; [1, T] or [B, L].
    rows: indices of its rows in the step batch. computed: tokens, padding included. labelled: number of losses.
    weights: of the targets, in their shape; None where each is 1. counts: for preferences only, the
    labels of each row. ratings: of its rows, 1 or -1; empty for pairs.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    rows: tuple[int, ...]
    computed: int
    labelled: int
    seq2seq: bool = field(default=False)
    weights: Tensor | None = field(default=None)
    counts: tuple[int, ...] = field(default=())
    ratings: tuple[int, ...] = field(default=())


def filler(kind: Kind, device: str, *, packed: bool, paired: bool, rated: bool) -> MicroBatch:
    """A micro-batch of a few tokens for a rank that has fewer than others; it has no rows, and its loss is to be 0."""
    row = {"input_ids": [0] * 4, "labels": [0] * 4, "chosen": 2 * paired, "rating": int(rated)}
    batch = {name: tensor.to(device) for name, tensor in Collator(kind)([row]).items()}
    return replace(split_micro_batches(batch, tokens=1, packed=packed)[0], rows=())


class Collator:
    """Collates rows `{"input_ids": [...], "labels": [...], "weights"?: [...]}` into one flat step batch; ignores other
    keys. normalize: `rows` divides the weights of a row's labels by their number, so that long answers do not count
    more than short ones. A pair is one row whose first `chosen` tokens are its first side; with a `rating` that is
    the row itself, and the rest another answer to its prompt.
    """

    def __init__(self, kind: Kind = "causal", normalize: Literal["tokens", "rows"] = "tokens") -> None:
        self.kind, self.normalize = kind, normalize

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The step batch of these rows, in their order. Raises ValueError if tokens and labels differ in number."""
        if features and features[0].get("chosen"):
            sides = [side for feature in features for side in _sides(feature)]
            ratings = {"ratings": torch.tensor([feature.get("rating", 0) for feature in features])}
            if not features[0].get("rating"):
                return {**self(sides), **ratings}
            others = {f"other_{name}": tensor for name, tensor in self(sides[1::2]).items()}
            return {**self(sides[::2]), **others, **ratings}
        ids = [torch.tensor(list(feature["input_ids"]), dtype=torch.long) for feature in features]
        labels = [torch.tensor(list(feature["labels"]), dtype=torch.long) for feature in features]
        sources = {"input_ids": torch.cat(ids)}
        if self.kind == "seq2seq":
            sources = {"source_ids": torch.cat(ids), "source_lengths": torch.tensor([len(row) for row in ids])}
        else:
            for row, label in zip(ids, labels, strict=True):
                if len(row) != len(label):
                    raise ValueError(f"a row has {len(row)} tokens and {len(label)} labels")
                label[:1] = IGNORED
        batch = {**sources, "labels": torch.cat(labels), "lengths": torch.tensor([len(row) for row in labels])}
        if self.normalize == "rows" or any(feature.get("weights") for feature in features):
            batch["weights"] = torch.cat(list(map(self._weights, features, labels)))
        return batch

    def _weights(self, feature: Mapping[str, Any], labels: Tensor) -> Tensor:
        weights = torch.tensor(feature.get("weights") or [1.0] * len(labels), dtype=torch.float32)
        return weights / max(1, int((labels != IGNORED).sum())) if self.normalize == "rows" else weights


def _sides(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    ids, labels, end = pair["input_ids"], pair["labels"], pair["chosen"]
    return [{"input_ids": ids[part], "labels": labels[part]} for part in (slice(end), slice(end, None))]


def count_labels(batch: Batch) -> int:
    """The number of losses in the batch."""
    return int((batch["labels"] != IGNORED).sum())


def loss_weight(batch: Batch) -> float:
    """The weights of all losses in the batch, by whose sum over all ranks its gradient is divided."""
    if "ratings" in batch:
        return float(len(batch["ratings"]))
    if "weights" not in batch:
        return float(count_labels(batch))
    return float(batch["weights"][batch["labels"] != IGNORED].double().sum())


def other_answers(batch: Batch) -> dict[str, Tensor]:
    """The second batch of a batch of rated answers."""
    return {name.removeprefix("other_"): tensor for name, tensor in batch.items() if name.startswith("other_")}


def split_micro_batches(
    batch: Batch, *, tokens: int, rows: int | None = None, packed: bool, counted: bool = False
) -> list[MicroBatch]:
    """Splits the batch into micro-batches of at most `tokens` computed tokens and `rows` rows, each row in exactly one.

    packed: without padding, for a model whose attention keeps rows apart; else groups of similar length, padded on the
    right, where padding counts as tokens. A row longer than the budget gets a micro-batch of its own. Deterministic.
    counted: gives each row's labels as `counts`, as for preferences.
    """
    lengths, seq2seq = batch["lengths"].tolist(), "source_ids" in batch
    most_rows = rows or len(lengths)
    targets = list(torch.split(batch["labels"], lengths))
    weights = list(torch.split(batch["weights"], lengths)) if "weights" in batch else None
    if seq2seq:
        source_lengths = batch["source_lengths"].tolist()
        ids, sizes = torch.split(batch["source_ids"], source_lengths), list(zip(source_lengths, lengths, strict=True))
    else:
        ids, sizes = torch.split(batch["input_ids"], lengths), [(length, 0) for length in lengths]
        # a label moves to the position that predicts it
        targets = [pad(row[1:], (0, min(1, len(row))), value=IGNORED) for row in targets]
        weights = None if weights is None else [pad(row[1:], (0, min(1, len(row)))) for row in weights]
    rated = "other_lengths" in batch
    if "ratings" in batch and not rated:
        groups = _groups_of_pairs(lengths, tokens, most_rows, packed=packed)
    elif packed and not seq2seq:
        groups = _best_fit(lengths, tokens, most_rows)
    else:
        groups = _group_by_length(sizes, tokens, most_rows)
    micros = [
        _pack(ids, targets, weights, group)
        if packed and not seq2seq
        else _pad(ids, targets, weights, group, seq2seq=seq2seq)
        for group in groups
    ]
    if not (counted or "ratings" in batch):
        return micros
    of_rows = torch.stack([(row != IGNORED).sum() for row in targets]).tolist()
    ratings = batch["ratings"].tolist() if rated else []
    return [
        replace(
            micro,
            counts=tuple(of_rows[row] for row in micro.rows),
            ratings=tuple(ratings[row] for row in micro.rows if rated),
        )
        for micro in micros
    ]


def _groups_of_pairs(lengths: list[int], tokens: int, pairs: int, *, packed: bool) -> list[list[int]]:
    """Groups of rows of which each two belong together."""
    both = list(zip(lengths[::2], lengths[1::2], strict=True))
    if packed:
        groups = _best_fit([sum(pair) for pair in both], tokens, pairs)
    else:
        groups = _group_by_length([(max(pair), 0) for pair in both], tokens // 2, pairs)
    return [[row for pair in group for row in (2 * pair, 2 * pair + 1)] for group in groups]


def row_indices(micro: MicroBatch, batch: Batch) -> Tensor:
    """For each position of `micro.targets` the index of its row in the step batch, in the shape of `targets`."""
    rows = torch.tensor(micro.rows, device=micro.targets.device)
    if "position_ids" in micro.inputs:  # packed
        return rows.repeat_interleave(batch["lengths"].to(rows.device)[rows])[None]
    return rows[:, None].expand_as(micro.targets)


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
    best = [0.0] + [float("inf")] * len(order)
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


def _pack(
    ids: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[Tensor] | None, group: list[int]
) -> MicroBatch:
    """The rows of `group` end to end in one sequence."""
    positions = torch.cat([torch.arange(len(ids[i]), device=ids[i].device) for i in group])[None]
    inputs = {"input_ids": torch.cat([ids[i] for i in group])[None], "position_ids": positions}
    joined = torch.cat([targets[i] for i in group])[None]
    counts = None if weights is None else torch.cat([weights[i] for i in group])[None]
    labelled = int((joined != IGNORED).sum())
    return MicroBatch(inputs, joined, tuple(group), positions.numel(), labelled, weights=counts)


def _pad(
    ids: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    group: list[int],
    *,
    seq2seq: bool,
) -> MicroBatch:
    """The rows of `group` padded on the right with token 0; for seq2seq the targets' tokens are computed too."""
    padded = pad_sequence([ids[i] for i in group], True, 0)
    mask = pad_sequence([torch.ones_like(ids[i]) for i in group], True, 0)
    joined = pad_sequence([targets[i] for i in group], True, IGNORED)
    computed = padded.numel() + (joined.numel() if seq2seq else 0)
    counts = None if weights is None else pad_sequence([weights[i] for i in group], True)
    inputs = {"input_ids": padded, "attention_mask": mask}
    return MicroBatch(inputs, joined, tuple(group), computed, int((joined != IGNORED).sum()), seq2seq, counts)
