"""The control tokens of a tokenizer: which texts become one token that steers, and where that must not happen."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from sft.chat.template import Refused

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


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
Piece = str | bytes


def place(text: str, pieces: list[Piece], unknown: str, decoded: Callable[[int], str]) -> list[tuple[int, int]] | None:
    """The characters [start, end) of each piece, or None where the walk does not hold.

    unknown: the token that stands for text of any length. decoded(i): the text of piece i by itself.
    """
    spelt = [list(dict.fromkeys(_spellings(piece, decoded, i))) for i, piece in enumerate(pieces)]
    known = [not unknown or piece != unknown for piece in pieces]
    for form in (str, _compatible, _folded):
        data, origin = _bytes(text, form)
        formed = [[_formed(option, form) for option in options] for options in spelt]
        if (found := _walk(data, formed, known)) is not None:
            return [(origin[start], origin[end - 1] + 1 if end > start else origin[start]) for start, end in found]
    return None


def _walk(data: bytes, spelt: list[list[bytes]], known: list[bool]) -> list[tuple[int, int]] | None:
    found: list[tuple[int, int]] = []
    at, waiting = 0, False  # waiting: an unknown token's end is not known yet
    for options, is_known in zip(spelt, known, strict=True):
        if not is_known:
            if not waiting:
                at = _past_space(data, at)
            found.append((at, at))
            waiting = True
            continue
        hit = _found_later(data, options, at) if waiting else _found_here(data, options, at)
        if hit is None:
            return None
        if waiting:
            found[-1] = (found[-1][0], hit[0])
            waiting = False
        found.append(hit)
        at = hit[1]
    if waiting:
        found[-1] = (found[-1][0], len(data))
        at = len(data)
    return found if not data[at:].strip() else None


def _found_here(data: bytes, options: list[bytes], at: int) -> tuple[int, int] | None:
    for start in dict.fromkeys((at, _past_space(data, at))):
        for option in options:
            if data.startswith(option, start):
                return start, start + len(option)
    return None


def _found_later(data: bytes, options: list[bytes], at: int) -> tuple[int, int] | None:
    places = [(data.find(option, at), option) for option in options if option]
    hits = [(start, start + len(option)) for start, option in places if start >= 0]
    return min(hits, default=None)


def _past_space(data: bytes, at: int) -> int:
    rest = data[at:]
    return at + len(rest) - len(rest.lstrip())


def _spellings(piece: Piece, decoded: Callable[[int], str], index: int) -> Iterator[bytes]:
    """How a piece may stand in the text, the likeliest first. A space in front may be the tokenizer's own."""
    if isinstance(piece, bytes):
        yield piece
        return
    if byte := _BYTE.fullmatch(piece):
        yield bytes([int(byte[1], 16)])
        return
    letters = _byte_letters()
    spaced = piece.replace("▁", " ")
    if not piece.isascii() and all(letter in letters for letter in piece):
        yield bytes(letters[letter] for letter in piece)
    yield spaced.encode(errors="surrogatepass")
    yield spaced.removeprefix(" ").encode(errors="surrogatepass")
    yield piece.removeprefix("##").removesuffix("</w>").encode(errors="surrogatepass")
    if "\ufffd" not in (shown := decoded(index)):
        yield shown.encode(errors="surrogatepass")


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes (openai/gpt-2, encoder.py: bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _bytes(text: str, form: Callable[[str], str]) -> tuple[bytes, list[int]]:
    """The text in a form, and the character that each byte of it comes from."""
    made, origin = bytearray(), []
    for index, character in enumerate(text):
        part = form(character).encode(errors="surrogatepass")
        made += part
        origin += [index] * len(part)
    return bytes(made), [*origin, len(text)]


def _formed(spelt: bytes, form: Callable[[str], str]) -> bytes:
    try:
        return form(spelt.decode()).encode()
    except UnicodeDecodeError:
        return spelt


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _folded(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.lower())
    return "".join(character for character in plain if not unicodedata.combining(character))


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

    def fixed(self, line: Line, text: str, cuts: list[int], fakes: list[tuple[int, int]]) -> Line:
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
