"""Where an answer ends: at an end-of-turn token, at a stop string, or unfinished at its token limit."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft.chat.template_probe import Stops

LOOP_TOKENS, LOOP_PERIOD, LOOP_EVERY = 48, 64, 16  # see `repeats`; looked for after every so many tokens
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an unfinished character decode to


@dataclass(frozen=True)
class Answer:
    """One answer. ids, text: without the end token, the stop string and anything after. stopped: it ended by itself.

    tokens: generated tokens, the end token included. truncated: the prompt's oldest tokens that were cut off. looped:
    it was ended because it only repeated itself.
    """

    ids: list[int]
    text: str
    stopped: bool
    tokens: int
    truncated: int = 0
    looped: bool = False


class StopCriteria:
    """Ends an answer at the end tokens and strings of `stops`, at the strings of `more` (`generation.stop`), and with
    `loops` where it only repeats itself."""

    def __init__(self, tokenizer: Any, stops: Stops, more: Sequence[str] = (), *, loops: bool = False) -> None:
        self.tokenizer, self.ids, self.loops = tokenizer, frozenset(stops.ids), loops
        self.strings = tuple(string for string in dict.fromkeys([*stops.strings, *more]) if string)
        self._window = max((len(string.encode()) for string in self.strings), default=0) + 1  # a token is >= 1 byte
        self._last_characters = {string[-1] for string in self.strings}
        self._may_finish: dict[int, bool] = {}

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the newest of `tokens` ended the answer. Text is decoded only where it could end a stop string."""
        if tokens[-1] in self.ids or self._looped(tokens):
            return True
        if not self.strings or not self._may_finish_a_string(tokens[-1]):
            return False
        text = decode(self.tokenizer, tokens[-self._window :], special=True)
        return any(string in text for string in self.strings)

    def _looped(self, tokens: Sequence[int]) -> bool:
        return self.loops and len(tokens) % LOOP_EVERY == 0 and repeats(tokens)

    def _may_finish_a_string(self, token: int) -> bool:
        if token not in self._may_finish:
            text = decode(self.tokenizer, [token], special=True)
            unclear = not text.isascii() or any(c.isspace() or not c.isascii() for c in self._last_characters)
            self._may_finish[token] = unclear or any(character in text for character in self._last_characters)
        return self._may_finish[token]

    def answer(self, tokens: Sequence[int], truncated: int = 0) -> Answer:
        """The answer in generated tokens: what precedes the first end token and the first stop string.

        Special tokens leave no trace in its text, and neither does an unfinished last character.
        """
        end = next((index for index, token in enumerate(tokens) if token in self.ids), None)
        ids = list(tokens[:end])
        stopped, count = end is not None, len(ids) + (end is not None)
        spelled_out = decode(self.tokenizer, ids, special=True)
        matches = [(spelled_out.find(string), string) for string in self.strings if string in spelled_out]
        rest = ""
        if matches:
            position, string = min(matches)
            before = self._tokens_within(ids, position)
            count = min(count, self._tokens_within(ids, position + len(string) - 1) + 1)
            rest = spelled_out[len(decode(self.tokenizer, ids[:before], special=True)) : position]
            ids, stopped = ids[:before], True
        text = (decode(self.tokenizer, ids) + rest).rstrip(INCOMPLETE)
        return Answer(ids, text, stopped, count, truncated, not stopped and self._looped(tokens))

    def _tokens_within(self, ids: list[int], characters: int) -> int:
        """How many of the first tokens fit into that many characters."""
        counts = range(1, len(ids) + 1)
        return bisect.bisect_right(counts, characters, key=lambda n: len(decode(self.tokenizer, ids[:n], special=True)))

    def held_back(self, text: str) -> int:
        """How many characters at the end of a streamed text may not be shown yet: they may begin a stop string."""
        longest = max((len(string) for string in self.strings), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-count:]) for string in self.strings):
                return count
        return 0


def repeats(tokens: Sequence[int]) -> bool:
    """Whether the newest tokens are a block of at most LOOP_PERIOD tokens three times or more, LOOP_TOKENS at least."""
    for period in range(1, min(LOOP_PERIOD, len(tokens) // 3) + 1):
        count = max(3 * period, LOOP_TOKENS)
        if count <= len(tokens) and tokens[-count + period :] == tokens[-count:-period]:
            return True
    return False


def decode(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    """The ids' text unchanged, special tokens spelled out (`special`) or left out."""
    text = tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class IncrementalText:
    """The text of tokens that arrive one by one, special tokens left out; each token is decoded a few times at most.

    A token's text may depend on the tokens before it (a leading space, half a character), so new tokens are decoded
    after the last ones that had text: `decode(context + new)` less `decode(context)`, as vLLM and TGI do.
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
        if len(after) > len(before) and not after.endswith(INCOMPLETE):
            self.text += after[len(before) :]
            self._context, self._new = self._new, []
