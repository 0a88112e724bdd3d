"""Encoded rows for inspection: tokens that are in the loss, masked or cut, as terminal text and as one HTML page."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2

from sft.chat.encode import Encoded, Encoder
from sft.chat.loss_mask import IGNORED
from sft.chat.tokenize import common_prefix

if TYPE_CHECKING:
    from rich.text import Text

State = Literal["labelled", "masked", "cut"]
STYLES: dict[str, str] = {"labelled": "bold green", "masked": "bright_black", "cut": "red strike", "special": "reverse"}
MARKS: dict[State, tuple[str, str]] = {"labelled": ("⟦", "⟧"), "masked": ("", ""), "cut": ("⟪", "⟫")}


@dataclass(frozen=True)
class Token:
    """One token: its id, its text, whether it is a control token, and its state (in the loss, masked, cut)."""

    id: int
    text: str
    special: bool
    state: State


def tokens(encoder: Encoder, row: Encoded, whole: Encoded) -> list[Token]:
    """The tokens of a row, with those that were cut for length where they are in `whole`, the row without a limit."""

    def token(index: int, state: State) -> Token:
        text = str(encoder.tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        piece = encoder.tokenizer.convert_ids_to_tokens(index)
        spaced = isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ")
        return Token(index, " " + text if spaced else text, index in encoder.vocabulary.texts, state)

    if encoder.kind == "seq2seq":
        return [token(one, "masked") for one in row.input_ids] + [token(one, "labelled") for one in row.labels]
    states: list[State] = ["masked" if label == IGNORED else "labelled" for label in row.labels]
    shown = [token(one, state) for one, state in zip(row.input_ids, states, strict=True)]
    first = common_prefix(row.input_ids, whole.input_ids)
    cut = whole.input_ids[first : first + row.truncated_tokens]
    return [*shown[:first], *(token(one, "cut") for one in cut), *shown[first:]]


def coloured(row: Sequence[Token], *, marks: bool) -> Text:
    """Tokens for a terminal: in the loss green, masked grey, cut struck through, control tokens reversed.

    marks: also put what is in the loss between ⟦ and ⟧ and what is cut between ⟪ and ⟫, where there are no colours.
    """
    from rich.text import Text

    text = Text()
    for state, tokens in groupby(row, lambda token: token.state):
        before, after = MARKS[state] if marks else ("", "")
        text.append(before)
        for token in tokens:
            style = f"{STYLES[state]} {STYLES['special']}" if token.special else STYLES[state]
            text.append(token.text.replace("\n", "↵\n") if state == "labelled" else token.text, style)
        text.append(after)
    return text


def headline(row: Encoded) -> str:
    """A row's counts in one line."""
    labelled = sum(1 for label in row.labels if label != IGNORED)
    cut = f", {row.truncated_tokens:,} cut for length" if row.truncated_tokens else ""
    dropped = f"; dropped: {row.dropped}" if row.dropped else ""
    counted = {weight for weight, label in zip(row.weights or [], row.labels, strict=False) if label != IGNORED}
    weights = f" with weight {' and '.join(f'{weight:g}' for weight in sorted(counted))}" if counted else ""
    return f"row {row.id}: {len(row.input_ids):,} tokens, {labelled:,} in the loss{weights}{cut}{dropped}"


def page(title: str, rows: Sequence[tuple[Encoded, Sequence[Token]]]) -> str:
    """One HTML page with everything in it."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["repr"] = repr
    source = Path(__file__).with_name("preview.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, rows=rows, headline=headline)


def choose(lengths: Sequence[int], limit: int, seed: int) -> list[int]:
    """Which rows to show first: the shortest, the longest, then some at random. limit 0 is every row, in order."""
    count = len(lengths)
    if limit <= 0 or count <= limit:
        return list(range(count))
    order = sorted(range(count), key=lambda index: lengths[index])
    first = list(dict.fromkeys([order[0], order[-1]]))[:limit]
    rest = [index for index in range(count) if index not in first]
    return first + random.Random(seed).sample(rest, limit - len(first))
