"""The control tokens of a tokenizer: which texts become one token that steers, and where that must not happen."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INNER = re.compile(r"think|thought|reason|tool|call", re.IGNORECASE)


class Vocabulary:
    """Added tokens by text, and the ones that words inside a message must not turn into.

    In the words of users, systems and tools these are all special tokens and all tokens that open or close turns. In an
    answer a special token that the template itself puts into answers (a think or a tool mark) stays a token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, words: Literal["plain", "token"] = "plain") -> None:
        self.words = words
        added = {str(token): (index, bool(token.special)) for index, token in tokenizer.added_tokens_decoder.items()}
        for text in tokenizer.all_special_tokens:
            added[text] = (int(tokenizer.convert_tokens_to_ids(text)), True)
        self.ids = {text: index for text, (index, _) in added.items()}
        self.texts = {index: text for text, index in self.ids.items()}
        self.special = {text for text, (_, special) in added.items() if special and text.strip()}
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        self.bos, self.unknown = str(tokenizer.bos_token or ""), str(tokenizer.unk_token or "")
        self._named = {str(text) for text in named if text}
        self.turning: set[int] = set()
        self.opener = ""  # the control token that opens turns, once it is known
        self._any = _pattern(text for text in self.ids if text.strip())
        self._patterns: dict[bool, re.Pattern[str] | None] = {}
        self.set_turns(set(), "")

    def set_turns(self, turns: set[str], source: str) -> None:
        """Takes the tokens that open and close turns, and the template's source, once they are known."""
        turns = {text for text in turns if not (_INNER.search(text) and text not in self.special)}
        inner = {text for text in self.special - turns - self._named if text in source}
        self.turning = {self.ids[text] for text in turns if text in self.ids}
        self.controlling = {self.ids[text] for text in (turns | self.special) - {self.unknown} if text in self.ids}
        self._patterns = {
            False: _pattern(self.special | turns),
            True: _pattern((self.special | turns | self._named) - inner),
        }

    def controls(self, role: str) -> re.Pattern[str] | None:
        """Finds the control tokens that are to be read as plain text in the words of `role`."""
        return None if self.words == "token" else self._patterns[role == "assistant"]

    def found(self, text: str) -> list[str]:
        """The added tokens in a text, in order."""
        return self._any.findall(text) if self._any else []

    def turns_in(self, text: str) -> bool:
        """Whether a token that opens or closes turns stands in a text."""
        return any(token == self.opener or self.ids[token] in self.turning for token in self.found(text))

    def holds_control(self, text: str) -> bool:
        return bool(self._any and self._any.search(text))

    def opening(self, text: str, *, but: str) -> str:
        """The text up to and with its first control token, if it begins with one that `but` does not begin with."""
        match = self._any.match(text, len(text) - len(text.lstrip())) if self._any else None
        if match is None or match[0] == self.bos or but.lstrip().startswith(match[0]):
            return ""
        return text[: match.end()]

    def spans(self, text: str, broken: Iterable[int]) -> list[tuple[int, int]]:
        """Where the control tokens stand that a mark was set into (one character after their begin)."""
        pattern = self._patterns[False]
        found = (pattern.match(text, at - 1) if pattern else None for at in broken)
        return [match.span() for match in found if match]

    def learn_opener(self, text: str) -> None:
        """Takes the token that opens turns from `text`: what stands before the first words of a conversation."""
        known = (token for token in self.found(text) if token not in self._named)
        self.opener = next(known, "")

    def edge(self, one: str, other: str, agree: int) -> int:
        """The last place in the first `agree` characters, common to both texts, where a token or a line may end.

        Such a place is behind a newline, or before or behind an added token, and inside of none.
        """
        edges = {at + 1 for at, character in enumerate(one[:agree]) if character == "\n"}
        inside: list[tuple[int, int]] = []
        for text in (one, other):
            for match in self._any.finditer(text) if self._any else ():
                if match.start() > agree:
                    break
                edges.update(match.span())
                inside.append(match.span())
        kept = [at for at in edges if at <= agree and not any(start < at < end for start, end in inside)]
        return max(kept, default=0)


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    kept = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, kept))) if kept else None


def first_at(starts: list[int], at: int) -> int:
    """The index of the first token that begins at character `at` or later."""
    return bisect_left(starts, at)
