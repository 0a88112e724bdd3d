"""Encoded rows for the eye: tokens with what becomes of them, as terminal text and as one HTML page."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

from sft.chat.assistant_spans import agreement
from sft.chat.encode import Encoded, Encoder
from sft.chat.loss_mask import IGNORED

if TYPE_CHECKING:
    from rich.text import Text


Fate = Literal["labelled", "masked", "cut"]
STYLES: dict[str, str] = {"labelled": "bold green", "masked": "bright_black", "cut": "red strike", "special": "reverse"}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
body{{font:15px/1.7 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;background:#fff;color:#222}}
pre{{font:14px/1.8 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ddd;
border-radius:6px;padding:.8rem}}
h1{{font-size:1.5rem;line-height:1.3;overflow-wrap:anywhere}} i{{opacity:.55;font-style:normal}}
span.t{{border-radius:3px;position:relative}} span.t:hover{{outline:2px solid #d33}}
span.t:hover::after{{content:attr(data-t);position:absolute;left:0;top:1.7em;z-index:1;padding:0 .5em;font:12px/1.8
ui-monospace,monospace;white-space:pre;color:#fff;background:#333;border-radius:4px;text-decoration:none}}
.labelled{{background:#c9efcf}} .masked{{color:#777}} .cut{{background:#f6d0d0;text-decoration:line-through}}
.special{{border-bottom:2px solid #36c}} .dropped{{color:#b00;font-weight:600}}
h2{{font-size:1rem;margin:1.6rem 0 .3rem}}
@media(prefers-color-scheme:dark){{body{{background:#181818;color:#ddd}} .labelled{{background:#1d5128}}
.masked{{color:#999}} .cut{{background:#5e2323}} pre{{border-color:#444}}}}
</style></head><body><h1>{title}</h1>
<p><span class="labelled">learnt</span> <span class="masked">read only</span> <span class="cut">cut for length</span>
<span class="special">control token</span>. Hover over a token, or tap it, for its number and text.</p>
{rows}
</body></html>
"""


@dataclass(frozen=True)
class Token:
    """One token: its id, its text, whether it steers, and what becomes of it."""

    id: int
    text: str
    special: bool
    fate: Fate


def tokens(encoder: Encoder, row: Encoded, whole: Encoded) -> list[Token]:
    """The tokens of a row; those that were cut for length stand where they stood in `whole`, the row with no limit."""
    made = [
        _token(encoder, token, "masked" if label == IGNORED else "labelled") for token, label in _pairs(encoder, row)
    ]
    if not row.truncated_tokens or encoder.kind == "seq2seq":
        return made
    first = agreement(row.input_ids, whole.input_ids)
    gone = whole.input_ids[first : first + row.truncated_tokens]
    return [*made[:first], *(_token(encoder, token, "cut") for token in gone), *made[first:]]


def _pairs(encoder: Encoder, row: Encoded) -> list[tuple[int, int]]:
    if encoder.kind == "seq2seq":
        return [(token, IGNORED) for token in row.input_ids] + [(token, token) for token in row.labels]
    return list(zip(row.input_ids, row.labels, strict=True))


def _token(encoder: Encoder, token: int, fate: Fate) -> Token:
    return Token(token, _text(encoder, token), token in encoder.vocabulary.texts, fate)


def _text(encoder: Encoder, token: int) -> str:
    text = str(encoder.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = encoder.tokenizer.convert_ids_to_tokens(token)
    return " " + text if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text


def coloured(row: Sequence[Token]) -> Text:
    """Tokens for a terminal: labelled green, masked grey, cut struck through, control tokens reversed."""
    from rich.text import Text

    made = Text()
    for token in row:
        style = f"{STYLES[token.fate]} {STYLES['special']}" if token.special else STYLES[token.fate]
        made.append(token.text.replace("\n", "↵\n") if token.fate == "labelled" else token.text, style)
    return made


def headline(row: Encoded) -> str:
    """A row's numbers in one line."""
    learnt = sum(1 for label in row.labels if label != IGNORED)
    said = f"row {row.id}: {len(row.input_ids):,} tokens, {learnt:,} learnt"
    if row.truncated_tokens:
        said += f", {row.truncated_tokens:,} cut for length"
    return said + (f"; dropped: {row.dropped}" if row.dropped else "")


def page(title: str, rows: Sequence[tuple[Encoded, Sequence[Token]]]) -> str:
    """One HTML page with everything in it."""
    parts = []
    for row, shown in rows:
        kind = ' class="dropped"' if row.dropped else ""
        spans = "".join(_span(token) for token in shown)
        parts.append(f"<h2{kind}>{escape(headline(row))}</h2>\n<pre>{spans}</pre>")
    return _PAGE.format(title=escape(title), rows="\n".join(parts))


def _span(token: Token) -> str:
    classes = f"t {token.fate}{' special' if token.special else ''}"
    shown = escape(token.text)
    if token.fate == "labelled":
        shown = shown.replace("\n", "<i>↵</i>\n")
    return f'<span class="{classes}" data-t="{token.id} {escape(repr(token.text))}">{shown}</span>'


def choose(lengths: Sequence[int], limit: int, seed: int) -> list[int]:
    """Which rows to show first: the shortest, the longest, then some at random. limit 0 is every row, in order."""
    count = len(lengths)
    if limit == 0 or count <= limit:
        return list(range(count))
    order = sorted(range(count), key=lambda index: lengths[index])
    first = list(dict.fromkeys([order[0], order[-1]]))[:limit]
    rest = [index for index in range(count) if index not in first]
    return first + random.Random(seed).sample(rest, limit - len(first))
