"""Rows over `model.max_seq_len`: what is cut, what stays, what is dropped. The end token survives every cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sft.chat.sentinels import Region
from sft.chat.tokenize import Line, first_at
from sft.errors import DataError

OverLength = Literal["truncate_left", "truncate_right", "drop", "split_turns", "error"]
OVER_LENGTH = "over length"
NO_LABEL = "no label left"
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """ids and labels of one row, and the tokens [first, end) of its answers, end tokens included."""

    ids: list[int]
    labels: list[int]
    answers: list[tuple[int, int]]


def fit(row: Row, limit: int, policy: OverLength, name: str, bos: int | None) -> tuple[Row, str | None]:
    """The row in at most `limit` tokens, and why it is dropped, if it is. Raises DataError under `error`.

    A row that `split_turns` cannot split any more is cut as under `truncate_left`.
    """
    over = len(row.ids) - limit
    if over <= 0:
        return row, None
    if policy == "error":
        raise DataError(
            f"row {name} has {len(row.ids):,} tokens, more than model.max_seq_len {limit:,}",
            where=f"row {name}",
            fix=f"--set model.max_seq_len={len(row.ids)}, or model.over_length: truncate_left, split_turns or drop",
        )
    if policy == "drop" or not row.answers:
        return row, OVER_LENGTH
    return _right(row, limit) if policy == "truncate_right" else _left(row, limit, bos)


def _left(row: Row, limit: int, bos: int | None) -> tuple[Row, str | None]:
    """The oldest tokens go; a text that begins with a begin token keeps it. The last answer stays whole.

    What follows the last answer (a newline) goes first where the answer needs its place, and at least one token of the
    prompt stays in front of it.
    """
    kept = 1 if bos is not None and row.ids[0] == bos else 0
    answer, answer_end = row.answers[-1]
    if answer <= kept:  # plain text: no prompt must stay in front of it
        answer = len(row.ids)
    for end in (len(row.ids), answer_end):
        first = max(kept, kept + end - limit)
        if first < answer:
            return Row(
                row.ids[:kept] + row.ids[first:end],
                row.labels[:kept] + row.labels[first:end],
                [(max(a, first) - first + kept, b - first + kept) for a, b in row.answers if b > first],
            ), None
    return row, OVER_LENGTH


def _right(row: Row, limit: int) -> tuple[Row, str | None]:
    """The newest tokens go; an answer that is cut keeps its end token, as the last token of the row."""
    ids, labels = row.ids[:limit], row.labels[:limit]
    answers = [(a, min(b, limit)) for a, b in row.answers if a < limit - 1]
    for first, end in row.answers:
        if first < limit < end:
            ids[-1], labels[-1] = row.ids[end - 1], row.labels[end - 1]
            if first == limit - 1:  # nothing of the answer but its end would be left
                labels[-1] = IGNORED
    left = any(label != IGNORED for label in labels)
    return Row(ids, labels, answers), None if left else NO_LABEL


Which = Literal["all_assistant", "last_assistant", "all_tokens"]


def label(
    line: Line, regions: list[Region], ends: dict[Region, list[int]], which: Which, messages: list[dict[str, Any]]
) -> Row:
    """ids and labels of a line: a token is learnt if it begins inside a region that is to be learnt.

    ends: region -> end tokens to put behind its region, where the template writes none. A message of weight 0 is not
    learnt, whatever `which` says.
    """
    ids: list[int] = []
    labels: list[int] = []
    answers: list[tuple[int, int]] = []
    at, everything = 0, which == "all_tokens"
    for region in regions:
        first, end = _first(line, region), first_at(line.starts, region.end)
        silent = messages[region.message].get("weight", 1) == 0 if region.message < len(messages) else False
        learnt = not silent and (which != "last_assistant" or region.message == regions[-1].message)
        before, inside = line.ids[at:first], line.ids[first:end] + ends.get(region, [])
        ids += before
        labels += before if everything else [IGNORED] * len(before)
        answers.append((len(ids) + first_at(line.starts, region.cut) - first, len(ids) + len(inside)))
        ids += inside
        labels += inside if learnt else [IGNORED] * len(inside)
        at = end
    rest = line.ids[at:]
    return Row(ids + rest, labels + (rest if everything else [IGNORED] * len(rest)), answers)


def _first(line: Line, region: Region) -> int:
    """The first token that is learnt: one that began behind the prompt and reaches into the region counts as well."""
    first = first_at(line.starts, region.start)
    reaches = first > 0 and line.starts[first - 1] >= region.cut and line.ends[first - 1] > region.start
    return first - 1 if reaches else first
