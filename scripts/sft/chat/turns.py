"""How a turn begins and ends: what two renders of the same words have in common around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft.chat.vocabulary import Vocabulary


@dataclass
class Turn:
    """What a template does with a plain turn; learnt from probes by `facts.learn`, so that rows need fewer renders.

    prompt: the generation prompt. tail: all that follows an answer at the end of a conversation. end: the end of the
    turn there. middle_end: the end of the turn where the conversation goes on. borrows: a turn has no end of its own,
    the next turn's control token ends it (GLM). tool_end: the token that ends a tool call, where it is borrowed too.
    space: the white space that ends the prompt, where the template writes it together with the answer's words.
    always: the template writes the prompt behind every conversation, asked or not (Llama 3 as first released).
    """

    prompt: str = ""
    tail: str = ""
    end: str = ""
    middle_end: str = ""
    borrows: bool = False
    tool_end: str = ""
    space: str = ""
    always: bool = False

    @property
    def known(self) -> bool:
        """Whether the template was probed."""
        return bool(self.tail or self.end or self.middle_end or self.prompt)


def parting(vocabulary: Vocabulary, tail: str, gap: str, *, whole: bool) -> int:
    """How many characters the prompt and the text before the answer share, down to a control token or a line.

    tail: what the prompt has after the last fixed point; gap: what the text has between it and the answer's first word,
    where that is known (`whole`). 0 where they share nothing.
    """
    agree = agreement(tail, gap)
    if whole and agree == len(gap):
        return agree  # the prompt goes on where the text has the answer already
    if not tail[agree:].strip():
        return agree  # only white space of the prompt is missing
    if whole and not gap[agree:].strip():
        return len(gap)
    return vocabulary.edge(tail, gap, agree)


def last_end(vocabulary: Vocabulary, tail: str, others: list[str]) -> str:
    """The end of the last turn: what `tail` shares with the same turn in conversations that go on (`others`)."""
    for other in others:
        shared = shared_end(vocabulary, tail, other)
        if shared.strip():
            return shared
    return tail.rstrip()


def middle_end(vocabulary: Vocabulary, turn: Turn, gap: str, alone: str | None, asked: str | None) -> str | None:
    """The end of a turn that is followed by others; "" where the template writes none, None where it is unclear.

    gap: what stands between its last word and the next turn's first. alone: what follows it where the conversation
    stops there; asked: the same with the generation prompt.
    """
    shared = "" if alone is None else shared_end(vocabulary, gap, alone)
    prompt = turn.prompt
    if alone is not None and gap.startswith(alone) and (turn.borrows or not alone.strip()):
        borrowed = vocabulary.opening(gap[len(alone) :], but=prompt)
        if borrowed:
            return alone + borrowed
    if shared.strip():
        return shared
    if asked is not None and prompt and asked.endswith(prompt):
        between = asked[: -len(prompt)]
        if gap.startswith(between) and between.strip():
            return between.rstrip()
        if not between.strip():
            return ""
    return "" if alone is not None and not alone.strip() else None


def shared_end(vocabulary: Vocabulary, one: str, other: str) -> str:
    """The common beginning of two texts, down to a control token or a line, trailing white space left out.

    A token that opens turns is not part of it, nor what follows.
    """
    agree = agreement(one, other)
    if agree < min(len(one), len(other)):
        agree = vocabulary.edge(one, other, agree)
    opening = one.find(vocabulary.opener, 1, agree) if vocabulary.opener else -1
    return one[: agree if opening < 0 else opening].rstrip()


def agreement(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters two texts (or tokens two rows) have in common at their begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halving: slices compare fast
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
