"""Where an answer ends: at an end-of-turn token, at a stop string, or in the middle, when its tokens run out."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BROKEN_CHARACTER = "�"  # what bytes decode to that are not (yet) a whole character


class StopCriteria(Protocol):
    """What ends an answer (`sft.chat.stops.Stops` is one)."""

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


def cut(tokenizer: Any, made: Sequence[int], ends: StopCriteria) -> Cut:
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


class StopWatcher:
    """Tells of an answer under way whether it has ended: at an end token, or with a stop string in its last tokens.

    A text is decoded only after a token that could finish a stop string.
    """

    def __init__(self, tokenizer: Any, ends: StopCriteria) -> None:
        self.tokenizer, self.ids = tokenizer, ends.ids
        self.strings = tuple(string for string in ends.strings if string)
        self.tail = max((len(string.encode()) for string in self.strings), default=0) + 1
        self._last = {string[-1] for string in self.strings}
        self._finishes: dict[int, bool] = {}

    def ended(self, made: Sequence[int]) -> bool:
        """Whether the newest token ended it. made: the answer's tokens so far, at least one."""
        if made[-1] in self.ids:
            return True
        if not self.strings or not self._may_finish(made[-1]):
            return False
        text = decode(self.tokenizer, made[-self.tail :], special=True)
        return any(string in text for string in self.strings)

    def _may_finish(self, token: int) -> bool:
        if token not in self._finishes:
            text = decode(self.tokenizer, [token], special=True)
            doubtful = not text.isascii() or any(letter.isspace() or not letter.isascii() for letter in self._last)
            self._finishes[token] = doubtful or any(letter in text for letter in self._last)
        return self._finishes[token]


class IncrementalText:
    """The text of tokens that arrive one by one, special tokens left out; each token is decoded a few times at most.

    A token's text may depend on those before it (a leading space, half a character), so new tokens are decoded after
    the last ones that had text: `decode(context + new)` less `decode(context)`, as vLLM and TGI detokenise.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, ""
        self._context: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> None:
        """Appends the token's text; an unfinished character is appended with the token that finishes it."""
        self._new.append(token)
        before = decode(self.tokenizer, self._context)
        after = decode(self.tokenizer, self._context + self._new)
        if len(after) > len(before) and not after.endswith(BROKEN_CHARACTER):
            self.text += after[len(before) :]
            self._context, self._new = self._new, []
