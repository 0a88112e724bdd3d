"""Where an answer ends: at an end-of-turn token, at a stop string, or in the middle, when its tokens run out."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria
from transformers.generation.logits_process import LogitsProcessor

BROKEN_CHARACTER = "�"  # what bytes decode to that are not (yet) a whole character


class Ends(Protocol):
    """What ends an answer (`sft.chat.encode.Stops` is one)."""

    @property
    def ids(self) -> frozenset[int]: ...

    @property
    def strings(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Cut:
    """An answer up to its end: ids and text without the end itself, and `made`, the tokens with it."""

    ids: list[int]
    text: str
    stopped: bool
    made: int


def cut(tokenizer: Any, made: Sequence[int], ends: Ends) -> Cut:
    """The answer in generated tokens: everything before the first end token and the first stop string.

    Special tokens leave no trace in the text, and neither does half a character at its end.
    """
    first = next((index for index, token in enumerate(made) if token in ends.ids), None)
    ids = list(made if first is None else made[:first])
    stopped, count = first is not None, len(ids) + (first is not None)
    whole = decode(tokenizer, ids, special=True)
    hits = [(whole.find(string), string) for string in ends.strings if string and string in whole]
    rest = ""
    if hits:
        position, string = min(hits)
        before = _tokens_in(tokenizer, ids, position)
        count = min(count, _tokens_in(tokenizer, ids, position + len(string) - 1) + 1)
        rest = whole[len(decode(tokenizer, ids[:before], special=True)) : position]
        ids, stopped = ids[:before], True
    text = (decode(tokenizer, ids) + rest).rstrip(BROKEN_CHARACTER)
    return Cut(ids, text, stopped, count)


def _tokens_in(tokenizer: Any, ids: list[int], characters: int) -> int:
    """How many of the first tokens fit into so many characters."""
    sizes = range(1, len(ids) + 1)
    return bisect.bisect_right(sizes, characters, key=lambda n: len(decode(tokenizer, ids[:n], special=True)))


def decode(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    """The ids' text as it is, with special tokens spelt out or left out."""
    text = tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def held_back(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of `text` may not be shown yet: half a character, or a stop string's beginning."""
    broken = len(text) - len(text.rstrip(BROKEN_CHARACTER))
    if broken:
        return broken + held_back(text[:-broken], strings)
    longest = max((len(string) for string in strings), default=0)
    for count in range(min(longest - 1, len(text)), 0, -1):
        if any(string.startswith(text[-count:]) for string in strings):
            return count
    return 0


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a row of a batch when a stop string stands at the end of its text; ends all rows when `cancelled` is set.

    start: tokens in front of the answer. Looks at as many of the last tokens as the longest string has bytes.
    """

    def __init__(self, tokenizer: Any, ends: Ends, start: int, cancelled: Event | None = None) -> None:
        self.tokenizer, self.start, self.cancelled = tokenizer, start, cancelled
        self.ids = ends.ids
        self.strings = tuple(string for string in ends.strings if string)
        self.tail = max((len(string.encode()) for string in self.strings), default=0) + 1
        self.done: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(input_ids)
        if self.cancelled is not None and self.cancelled.is_set():
            return torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        self.done = self.done or [False] * rows
        if self.strings:
            tails = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :].tolist()
            for index, tail in enumerate(tails):
                self.done[index] = self.done[index] or tail[-1] in self.ids or self._hit(tail)
        return torch.tensor(self.done, dtype=torch.bool, device=input_ids.device)

    def _hit(self, tail: list[int]) -> bool:
        text = decode(self.tokenizer, tail, special=True)
        return any(string in text for string in self.strings)


class RepetitionPenalty(LogitsProcessor):  # type: ignore[misc]
    """The penalty of Keskar et al. 2019 (CTRL), as transformers applies it, but for two things: padding does not count
    as text (so a batch answers as one by one), and end tokens are never made less likely (so answers still stop).

    padding: [B, P], true where a prompt is padded.
    """

    def __init__(self, penalty: float, padding: torch.Tensor, spared: frozenset[int]) -> None:
        self.penalty, self.padding, self.spared = penalty, padding, sorted(spared)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for row, ids in enumerate(input_ids):
            text = torch.cat([ids[: self.padding.shape[1]][~self.padding[row]], ids[self.padding.shape[1] :]])
            seen[row, text] = True
        seen[:, self.spared] = False
        return torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)
