"""Which characters each token of a tokenizer without offsets stands for, found by walking along the text.

Every token spells a piece of the text: as it stands, with SentencePiece's `▁`, in GPT-2's letters for bytes, as
`<0xE2>`, with WordPiece's `##`, or as its decoding shows it. The walk holds only if all tokens are found in their order
and nothing but white space is passed over. A text that the tokenizer normalises (compatibility characters, case,
accents) is walked in that form, with the place of every character kept.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

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
