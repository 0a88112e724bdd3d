"""Rows as rendered text, `{"input", "target"}`: made from conversations, read back as the template ends them."""

from __future__ import annotations

from typing import Any

from sft.chat.facts import Facts
from sft.chat.layout import Layout, Region
from sft.chat.template import Refused

Row = dict[str, Any]


def layout(row: Row, facts: Facts) -> Layout:
    """The text of a rendered row: as the template would end it, unless it ends so already."""
    source, target = str(row["input"]), str(row["target"])
    turn, shown = facts.turn, len(target)
    tail, end, missing = turn.tail, turn.end, None if turn.end.strip() else turn.middle_end.strip()
    if any(target.rstrip().endswith(ending.strip()) for ending in facts.ends):
        tail, end, missing, shown = "", "", None, len(target.rstrip())
    start = len(source) - (len(turn.space) if turn.space and source.endswith(turn.space) else 0)
    region = Region(0, start, len(source) + shown + len(end), missing, asked=len(source))
    return Layout(source + target + tail, [region], spans(row), len(source))


def source(row: Row) -> Layout:
    """The text that a rendered row asks with."""
    text = str(row["input"])
    return Layout(text, fakes=[fake for fake in spans(row) if fake[1] <= len(text)])


def spans(row: Row) -> list[tuple[int, int]]:
    """Where control tokens stand in the row's words, which are plain text there."""
    return [(int(start), int(end)) for start, end in row.get("plain_spans") or []]


def split(found: Layout, facts: Facts) -> Row:
    """A conversation's `input`, up to where the model begins to write its last answer, its `target` without the end
    that the template always writes, and `plain_spans`. Raises Refused with the reason.
    """
    if not found.regions:
        raise Refused("there is no answer in it")
    region, turn, text = found.regions[-1], facts.turn, found.text
    usual = region.end + len(turn.tail) - len(turn.end)
    if text[region.end - len(turn.end) :] == turn.tail and usual == len(text):
        target = text[region.cut : region.end - len(turn.end)]
    elif any(text[: region.end].endswith(ending.strip()) for ending in facts.ends):
        target = text[region.cut :]
    else:
        raise Refused("its last answer ends otherwise than answers do, so it cannot be told as input and target")
    made: Row = {"input": text[: region.cut], "target": target}
    return {**made, "plain_spans": [list(fake) for fake in found.fakes]} if found.fakes else made
