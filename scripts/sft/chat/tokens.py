"""Text to token ids, with the place of every token, cut where the model begins to write.

A rendered text is tokenised once, as a whole. Two things may then be wrong in a stretch between control tokens, and
only that stretch is tokenised again: a token lies across the place where the model begins to write (when serving, the
prompt is tokenised alone, so there is always a boundary), or words of a message became a control token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sft.chat.alignment import place
from sft.chat.template import Refused
from sft.chat.vocabulary import Vocabulary, first_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEADS = ("\n", ".", "a", "0")


@dataclass
class Line:
    """Token ids with the characters [start, end) of the text that each stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def shifted(self, by: int) -> Line:
        return Line(self.ids, [at + by for at in self.starts], [at + by for at in self.ends])

    def __getitem__(self, part: slice) -> Line:
        return Line(self.ids[part], self.starts[part], self.ends[part])

    def __add__(self, other: Line) -> Line:
        return Line(self.ids + other.ids, self.starts + other.starts, self.ends + other.ends)


class Tokens:
    """Tokenises rendered texts. A tokenizer that tells no offsets (a slow one) has them found by `alignment`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        fast = bool(getattr(tokenizer, "is_fast", False))
        self._backend: Any = getattr(tokenizer, "_tokenizer", None) if fast else None  # the tokenizers library's own
        self.walks = self._backend is None
        self._glued: bool | None = None
        self._begins: bool | None = None

    def lines(self, texts: list[str]) -> list[Line]:
        """Every text as a whole; control tokens become their ids, nothing is added. Raises Refused: see `_walked`."""
        backend = self._backend
        if backend is None:
            return [self._walked(text, plain=False) for text in texts]
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        return [_line(made) for made in backend.encode_batch(texts, add_special_tokens=False)]

    def ids(self, text: str) -> list[int]:
        return self.lines([text])[0].ids

    def plain(self, text: str) -> Line:
        """A text in which no special token is recognised."""
        if self._backend is None:
            return self._walked(text, plain=True)
        before = self._backend.encode_special_tokens
        self._backend.encode_special_tokens = True
        try:
            return self.lines([text])[0]
        finally:
            self._backend.encode_special_tokens = before

    def _walked(self, text: str, *, plain: bool) -> Line:
        """The tokens of a tokenizer without offsets. Raises Refused where its tokens do not spell the text."""
        tokenizer: Any = self.tokenizer
        ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        spans = place(
            text, pieces, self.vocabulary.unknown, lambda index: str(tokenizer.decode([ids[index]], **options))
        )
        if spans is None:
            raise Refused("the tokenizer has no offsets, and its tokens do not spell this text, so none can be placed")
        return Line(ids, [start for start, _ in spans], [end for _, end in spans])

    def mended(self, line: Line, text: str, cuts: list[int], fakes: list[tuple[int, int]]) -> Line:
        """The line with a token boundary at every cut, and with control tokens in `fakes` (characters) as plain text.

        Raises Refused where the vocabulary has no plain way to write a fake.
        """
        wrong = [cut for cut in cuts if self._lies_across(line, text, cut)]
        if not wrong and not fakes:
            return line
        places = zip(line.ids, line.starts, line.ends, strict=True)
        fixed = [
            index
            for index, (token, start, end) in enumerate(places)
            if token in self.vocabulary.texts and not any(a < end and start < b for a, b in fakes)
        ]
        made, first, at = Line([], [], []), 0, 0
        for index in [*fixed, len(line.ids)]:
            end = line.starts[index] if index < len(line.ids) else len(text)
            inner = [cut for cut in wrong if at < cut < end]
            within = [fake for fake in fakes if at <= fake[0] and fake[1] <= end]
            made += self._again(text, at, end, inner, within) if inner or within else line[first:index]
            made += line[index : index + 1]
            first, at = index + 1, line.ends[index] if index < len(line.ids) else end
        return made

    def _lies_across(self, line: Line, text: str, cut: int) -> bool:
        """Whether a token stands for characters on both sides; white space that a control token swallows is fine."""
        index = first_at(line.starts, cut) - 1
        if index < 0 or line.ends[index] <= cut:
            return False
        swallowed = line.ids[index] in self.vocabulary.texts and not text[cut : line.ends[index]].strip()
        return not swallowed

    def _again(self, text: str, start: int, end: int, cuts: list[int], fakes: list[tuple[int, int]]) -> Line:
        """The stretch [start, end) in pieces, each tokenised by itself."""
        made = Line([], [], [])
        for one, other in pairwise([start, *cuts, end]):
            piece, inside = text[one:other], [fake for fake in fakes if one <= fake[0] and fake[1] <= other]
            middle = one != start or (start > 0 and not self._begins_again())
            line = self._piece(piece, plain=bool(inside), middle=middle)
            if any(token in self.vocabulary.controlling for token in line.ids):
                line = self._apart(piece, [(a - one, b - one) for a, b in inside], middle=middle)
            made += line.shifted(one)
        return made

    def _apart(self, piece: str, fakes: list[tuple[int, int]], *, middle: bool) -> Line:
        """Breaks each fake after its first character; for vocabularies where its plain spelling is the token itself."""
        bounds = [0, *(fake[0] + 1 for fake in fakes), len(piece)]
        made = Line([], [], [])
        for one, other in pairwise(bounds):
            made += self._piece(piece[one:other], plain=True, middle=middle or one > 0).shifted(one)
        if any(token in self.vocabulary.controlling for token in made.ids):
            raise Refused("a control token in a message cannot be written as plain text in this vocabulary")
        return made

    def _piece(self, text: str, *, plain: bool, middle: bool) -> Line:
        encode = self.plain if plain else lambda given: self.lines([given])[0]
        if not text:
            return Line([], [], [])
        if not middle or not self._glues():
            return encode(text)
        for lead in _LEADS:
            alone, both = encode(lead), encode(lead + text)
            count = len(alone.ids)
            if both.ids[:count] == alone.ids and both.starts[count : count + 1] == [len(lead)]:
                return both[slice(count, None)].shifted(-len(lead))
        return encode(text)

    def _begins_again(self) -> bool:
        """Whether what follows a control token is tokenised as a text of its own would be."""
        if self._begins is None:
            control = next(iter(sorted(self.vocabulary.special)), "")
            self._begins = self.ids(control + "cd")[1:] == self.ids("cd") if control else True
        return self._begins

    def _glues(self) -> bool:
        """Whether a text's begin is tokenised otherwise than the same text in the middle (SentencePiece's `▁`)."""
        if self._glued is None:
            self._glued = self.ids("ab\ncd") != [*self.ids("ab\n"), *self.ids("cd")]
        return self._glued


def _line(made: Any) -> Line:
    starts, ends = zip(*made.offsets, strict=True) if made.offsets else ((), ())
    return Line(made.ids, list(starts), list(ends))
