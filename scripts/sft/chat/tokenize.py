"""Tokens of rendered texts: control tokens only where the template writes them, boundaries where a prompt ends."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from sft.chat.template import Refused
from sft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INNER = re.compile(r"think|thought|reason|tool|call", re.IGNORECASE)
_LEADS = ("\n", ".", "a", "0")  # texts to put before a piece that is not the beginning of a text


class Vocabulary:
    """Added tokens by text, and those that words inside a message must not turn into.

    In the words of users, systems and tools these are all special tokens and all tokens that open or close turns. In an
    answer a special token that the template itself puts into answers (a think or a tool mark) stays a token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, control_text: Literal["plain", "token"] = "plain"
    ) -> None:
        self.control_text = control_text
        added = {str(token): (index, bool(token.special)) for index, token in tokenizer.added_tokens_decoder.items()}
        for text in tokenizer.all_special_tokens:
            added[text] = (int(tokenizer.convert_tokens_to_ids(text)), True)
        self.ids = {text: index for text, (index, _) in added.items()}
        self.texts = {index: text for text, index in self.ids.items()}
        self.special = {text for text, (_, special) in added.items() if special and text.strip()}
        self.bos, self.unknown = str(tokenizer.bos_token or ""), str(tokenizer.unk_token or "")
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        self._named = {str(text) for text in named if text}
        self.opener = ""  # the control token that opens turns, once it is known
        self._any = _pattern(self.ids)
        self.set_turn_tokens(set(), "")

    def set_turn_tokens(self, turns: set[str], source: str) -> None:
        """Sets the tokens that open and close turns, known from a probe of the template with this source."""
        turns = {text for text in turns if text in self.special or not _INNER.search(text)}
        inner = {text for text in self.special - turns - self._named if text in source}
        self.control_ids = {self.ids[text] for text in (turns | self.special) - {self.unknown} if text in self.ids}
        self._in_words = _pattern(self.special | turns)
        self._in_answers = _pattern((self.special | turns | self._named) - inner)

    def set_opener(self, text: str) -> None:
        """Sets the token that opens turns from `text`: what the template writes before the first words."""
        self.opener = next((token for token in self.tokens_in(text) if token not in self._named), "")

    def controls(self, role: str) -> re.Pattern[str] | None:
        """Finds the control tokens that are plain text in the words of `role`."""
        if self.control_text == "token":
            return None
        return self._in_answers if role == "assistant" else self._in_words

    def tokens_in(self, text: str) -> list[str]:
        """The added tokens in a text, in order."""
        return self._any.findall(text) if self._any else []

    def leading_token(self, text: str, *, unless: str) -> str:
        """The text up to and including its first control token, if it begins with one that `unless` does not."""
        match = self._any.match(text, len(text) - len(text.lstrip())) if self._any else None
        if match is None or match[0] == self.bos or unless.lstrip().startswith(match[0]):
            return ""
        return text[: match.end()]

    def plain_spans(self, text: str, broken: Iterable[int]) -> list[tuple[int, int]]:
        """Where the control tokens are that a sentinel was set into (one character after their begin)."""
        matches = (self._in_words.match(text, at - 1) if self._in_words else None for at in broken)
        return [match.span() for match in matches if match]

    def token_edge(self, text: str, other: str, shared: int) -> int:
        """The last place in the first `shared` characters, common to both, where a line or an added token ends."""
        spans = [match.span() for one in (text, other) if self._any for match in self._any.finditer(one)]
        edges = [*(at for span in spans for at in span), *(at + 1 for at in range(shared) if text[at] == "\n")]
        outside = (at for at in edges if at <= shared and not any(start < at < end for start, end in spans))
        return max(outside, default=0)


def common_prefix(one: Any, other: Any) -> int:
    """How many items two sequences share at their beginning."""
    shortest = min(len(one), len(other))
    return next((at for at in range(shortest) if one[at] != other[at]), shortest)


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


@dataclass
class Line:
    """Token ids with the characters [start, end) of the text that each represents."""

    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def first_at(self, position: int) -> int:
        """The index of the first token that starts at character `position` or later."""
        return bisect_left(self.starts, position)

    def shifted(self, by: int) -> Line:
        return Line(self.ids, [at + by for at in self.starts], [at + by for at in self.ends])

    def __getitem__(self, part: slice) -> Line:
        return Line(self.ids[part], self.starts[part], self.ends[part])

    def __add__(self, other: Line) -> Line:
        return Line(self.ids + other.ids, self.starts + other.starts, self.ends + other.ends)


class Tokens:
    """Tokenises rendered texts. Raises ModelError for a tokenizer that gives no character offsets (a slow one)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._backend: Any = getattr(tokenizer, "_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
        if self._backend is None:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so labels cannot be placed",
                where=str(tokenizer.name_or_path),
                fix="use a model that ships tokenizer.json, or convert the tokenizer to the tokenizers library's format"
                " and put the tokenizer.json beside the model",
            )
        control = next(iter(sorted(vocabulary.special)), "")
        # whether what follows a control token is tokenised like the beginning of a text
        self._restarts = not control or self.ids(control + "cd")[1:] == self.ids("cd")
        # whether the beginning of a text is tokenised unlike the same text in the middle (SentencePiece's `▁`)
        self._prefixes = self.ids("ab\ncd") != [*self.ids("ab\n"), *self.ids("cd")]

    def lines(self, texts: list[str]) -> list[Line]:
        """Every text as a whole; control tokens become their ids, nothing is added."""
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            Line(one.ids, [start for start, _ in one.offsets], [end for _, end in one.offsets]) for one in encodings
        ]

    def ids(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.lines([text])[0].ids

    def _plain(self, text: str) -> Line:
        """A text in which no special token is recognised."""
        before = self._backend.encode_special_tokens
        self._backend.encode_special_tokens = True
        try:
            return self.lines([text])[0]
        finally:
            self._backend.encode_special_tokens = before

    def retokenise(self, line: Line, text: str, cuts: list[int], plain: list[tuple[int, int]]) -> Line:
        """The line with a token boundary at every cut, and control tokens in the spans `plain` (characters) as text.

        Only stretches between control tokens that need it are tokenised again. Raises Refused if that cannot be done.
        """
        crossed = [cut for cut in cuts if self._is_crossed(line, text, cut)]
        if not crossed and not plain:
            return line
        fixed = [
            index
            for index, (token, start, end) in enumerate(zip(line.ids, line.starts, line.ends, strict=True))
            if token in self.vocabulary.texts and not any(a < end and start < b for a, b in plain)
        ]
        result, first, at = Line(), 0, 0
        for index in [*fixed, len(line.ids)]:
            end = line.starts[index] if index < len(line.ids) else len(text)
            inner = [cut for cut in crossed if at < cut < end]
            spans = [span for span in plain if at <= span[0] and span[1] <= end]
            result += self._stretch(text, at, end, inner, spans) if inner or spans else line[first:index]
            result += line[index : index + 1]
            first, at = index + 1, line.ends[index] if index < len(line.ids) else end
        return result

    def _is_crossed(self, line: Line, text: str, cut: int) -> bool:
        """Whether a token has characters on both sides; white space that a control token swallows does not count."""
        index = line.first_at(cut) - 1
        if index < 0 or line.ends[index] <= cut:
            return False
        return line.ids[index] not in self.vocabulary.texts or bool(text[cut : line.ends[index]].strip())

    def _stretch(self, text: str, start: int, end: int, cuts: list[int], plain: list[tuple[int, int]]) -> Line:
        """Characters [start, end) in pieces between the cuts, each tokenised by itself."""
        result = Line()
        for low, high in pairwise([start, *cuts, end]):
            piece, spans = text[low:high], [(a - low, b - low) for a, b in plain if low <= a and b <= high]
            middle = low != start or (start > 0 and not self._restarts)
            line = self._piece(piece, plain=bool(spans), middle=middle)
            if self.vocabulary.control_ids & set(line.ids):
                line = self._spelt_out(piece, spans, middle=middle)
            result += line.shifted(low)
        return result

    def _spelt_out(self, piece: str, spans: list[tuple[int, int]], *, middle: bool) -> Line:
        """Breaks each span after its first character, where the plain spelling of a token is the token itself."""
        result = Line()
        for low, high in pairwise([0, *(start + 1 for start, _ in spans), len(piece)]):
            result += self._piece(piece[low:high], plain=True, middle=middle or low > 0).shifted(low)
        if self.vocabulary.control_ids & set(result.ids):
            raise Refused("a control token in a message cannot be written as plain text in this vocabulary")
        return result

    def _piece(self, text: str, *, plain: bool, middle: bool) -> Line:
        """The tokens of a piece of text. middle: it is not the beginning of a text, and must not be treated as one."""
        if not text:
            return Line()
        encode = self._plain if plain else lambda one: self.lines([one])[0]
        for lead in _LEADS if middle and self._prefixes else ():
            alone, both = encode(lead), encode(lead + text)
            count = len(alone.ids)
            if both.ids[:count] == alone.ids and both.starts[count : count + 1] == [len(lead)]:
                return both[slice(count, None)].shifted(-len(lead))
        return encode(text)
