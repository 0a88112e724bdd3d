"""The loss mask: which tokens of a row are in the loss, and what is left of both in a row over `model.max_seq_len`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sft.chat.sentinels import Region
from sft.chat.template import Message
from sft.chat.tokenize import Line
from sft.errors import DataError

InLoss = Literal["all_assistant", "last_assistant", "all_tokens"]  # `train.labels`
OverLength = Literal["truncate_left", "truncate_right", "drop", "split_turns", "error"]  # `model.over_length`
OVER_LENGTH = "over length"
NO_LABEL = "no label left"
IGNORED = -100


@dataclass(frozen=True)
class LabelledRow:
    """Token ids and labels of one row, the weight of each label, and the tokens [first, end) of its answers, end tokens
    included.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def mask_loss(
    line: Line, regions: list[Region], missing_ends: dict[Region, list[int]], in_loss: InLoss, messages: list[Message]
) -> LabelledRow:
    """The only place where a loss mask is built: labels are the token's id where a loss is taken, else IGNORED.

    A token is in the loss if it starts inside a region (what the model writes as one answer, its end token included),
    unless the message has `weight: 0` or `in_loss` excludes it; it counts as much as the message's weight.
    missing_ends: region -> the end tokens to append to it where the template writes none.
    """
    row = LabelledRow()

    def append(ids: list[int], trained: bool, weight: float = 1.0) -> None:
        row.ids.extend(ids)
        row.labels.extend(ids if trained else [IGNORED] * len(ids))
        row.weights.extend([weight] * len(ids))

    position = 0
    for region in regions:
        first, end = _first_token(line, region), line.first_at(region.end)
        weight = messages[region.message].get("weight", 1) if region.message < len(messages) else 1
        is_last = region.message == regions[-1].message
        append(line.ids[position:first], trained=in_loss == "all_tokens")
        answer = len(row.ids) + line.first_at(region.boundary) - first
        append(
            line.ids[first:end] + missing_ends.get(region, []),
            trained=weight != 0 and (is_last or in_loss != "last_assistant"),
            weight=weight,
        )
        row.answers.append((answer, len(row.ids)))
        position = end
    append(line.ids[position:], trained=in_loss == "all_tokens")
    return row


def _first_token(line: Line, region: Region) -> int:
    """The first token in the loss: also one that started behind the prompt and reaches into the region."""
    first = line.first_at(region.start)
    reaches = first > 0 and line.starts[first - 1] >= region.boundary and line.ends[first - 1] > region.start
    return first - 1 if reaches else first


def fit_length(
    row: LabelledRow, limit: int, policy: OverLength, name: str, bos: int | None
) -> tuple[LabelledRow, str | None]:
    """The row in at most `limit` tokens, and why it is dropped (None if it is not). The end token of an answer survives
    every cut. A row that `split_turns` cannot split is cut as under `truncate_left`. Raises DataError under `error`.
    """
    if len(row.ids) <= limit:
        return row, None
    if policy == "error":
        what = f"row {name} has {len(row.ids):,} tokens, more than model.max_seq_len {limit:,}"
        fix = f"--set model.max_seq_len={len(row.ids)}, or model.over_length: truncate_left, split_turns or drop"
        raise DataError(what, where=f"row {name}", fix=fix)
    if policy == "drop" or not row.answers:
        return row, OVER_LENGTH
    return _truncate_right(row, limit) if policy == "truncate_right" else _truncate_left(row, limit, bos)


def _truncate_left(row: LabelledRow, limit: int, bos: int | None) -> tuple[LabelledRow, str | None]:
    """Cuts the oldest tokens but a begin token. The last answer stays whole, with at least one token of the prompt in
    front; what follows it (a newline) is cut if that makes it fit.
    """
    head = 1 if bos is not None and row.ids[0] == bos else 0
    answer, answer_end = row.answers[-1]
    if answer <= head:  # plain text: no prompt has to stay in front of it
        answer = len(row.ids)
    for end in (len(row.ids), answer_end):
        first = max(head, head + end - limit)
        if first < answer:
            answers = [(max(a, first) - first + head, b - first + head) for a, b in row.answers if b > first]
            ids, labels = row.ids[:head] + row.ids[first:end], row.labels[:head] + row.labels[first:end]
            return LabelledRow(ids, labels, answers, row.weights[:head] + row.weights[first:end]), None
    return row, OVER_LENGTH


def _truncate_right(row: LabelledRow, limit: int) -> tuple[LabelledRow, str | None]:
    """Cuts the newest tokens; an answer that is cut keeps its end token, as the last token of the row."""
    ids, labels = row.ids[:limit], row.labels[:limit]
    answers = [(a, min(b, limit)) for a, b in row.answers if a < limit - 1]
    for first, end in row.answers:
        if first < limit < end:
            ids[-1], labels[-1] = row.ids[end - 1], row.labels[end - 1]
            if first == limit - 1:  # nothing of the answer but its end would be left
                labels[-1] = IGNORED
    trained = any(label != IGNORED for label in labels)
    return LabelledRow(ids, labels, answers, row.weights[:limit]), None if trained else NO_LABEL
