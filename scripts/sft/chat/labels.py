"""The only place where a loss mask is made: from regions of the text, never from token ids that look like padding."""

from __future__ import annotations

from typing import Any, Literal

from sft.chat.layout import Region
from sft.chat.length import IGNORED, Row
from sft.chat.tokens import Line
from sft.chat.vocabulary import first_at

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
