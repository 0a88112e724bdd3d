"""One self-contained HTML page: style, script and drawings inside it, good on a phone, in the dark and on paper.

page("Title", [Section("Lengths", [text("Half have ..."), table(["role", "median"], rows)])])

Everything given as `str` is escaped; what is `Html` was made here. The page's policy forbids every request and every
script but its own, so no text in it, whoever wrote it, can run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path
from typing import Any, Literal

Tone = Literal["good", "bad", "even"]
_HERE = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none';img-src data:;style-src 'unsafe-inline';script-src '{digest}'">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>
<body><header><h1>{title}</h1>{nav}</header><main>
{body}
</main><script>{script}</script></body></html>
"""


class Html(str):
    """Text that is HTML already: made by the functions of this file alone."""

    __slots__ = ()


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, what it is sorted and filtered by, and how it stands."""

    shown: str
    value: float | str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; without a title it stands above all others."""

    title: str
    parts: Sequence[Html]


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    titled = [(_slug(section.title), section.title) for section in sections if section.title]
    links = "".join(f'<a href="#{slug}">{escape(name)}</a>' for slug, name in titled)
    return _PAGE.format(
        digest=f"sha256-{digest}",
        title=escape(title),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        nav=f'<nav aria-label="Sections">{links}</nav>' if len(titled) > 1 else "",
        body="\n".join(_section(section) for section in sections),
        script=script,
    )


def _section(section: Section) -> str:
    inner = "\n".join(section.parts)
    if not section.title:
        return f"<section>{inner}</section>"
    slug = _slug(section.title)
    return f'<section aria-labelledby="{slug}"><h2 id="{slug}">{escape(section.title)}</h2>\n{inner}</section>'


def _slug(title: str) -> str:
    return "s-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def shown(text: str) -> str:
    """The text as HTML, unless it is that already."""
    return text if isinstance(text, Html) else escape(text)


def text(words: str, *, soft: bool = False) -> Html:
    """A paragraph."""
    return Html(f"<p{' class=soft' if soft else ''}>{shown(words)}</p>")


def heading(words: str) -> Html:
    """A heading inside a section."""
    return Html(f"<h3>{escape(words)}</h3>")


def verdict(headline: str, words: str = "", tone: Tone = "even") -> Html:
    """A finding in plain words; the colour says no more than the words do."""
    return Html(f'<p class="verdict {tone}"><b>{escape(headline)}</b> {escape(words)}</p>')


def bullets(lines: Iterable[str]) -> Html:
    """A list."""
    return Html("<ul>" + "".join(f"<li>{shown(line)}</li>" for line in lines) + "</ul>")


def details(summary: str, *parts: str) -> Html:
    """Something that is opened by a click, and by printing."""
    return Html(f"<details><summary>{escape(summary)}</summary>{''.join(shown(part) for part in parts)}</details>")


def code(words: str) -> Html:
    """Text as it stands, in a fixed width."""
    return Html(f"<pre>{escape(words)}</pre>")


def facts(pairs: Mapping[str, object]) -> Html:
    """Names and values, as a table of two columns."""
    rows = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{shown(str(v))}</td></tr>' for k, v in pairs.items())
    return Html(f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>')


def figures(drawn: Iterable[Html]) -> Html:
    """Figures side by side, as many as there is room for."""
    return Html(f'<div class="figures">{"".join(drawn)}</div>')


def figure(svg: Html, title: str, words: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A drawing with its caption, and its figures as a table for those who cannot see it or want them."""
    inner = details("the figures", table(columns, rows))
    head = f"<b>{escape(title)}</b>{escape(words)}"
    return Html(f"<figure>{svg}<figcaption>{head}{inner}</figcaption></figure>")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    caption: str = "",
    search: str = "",
    choices: Sequence[int] = (),
    cards: bool = False,
) -> Html:
    """A table that a click on a heading sorts.

    rows: of str, Html, int, float or Cell. search: the label of a field that filters rows by words, "" for none.
    choices: columns that a list filters by. cards: on a phone each row becomes a card.
    """
    cells = [[cell(one) for one in row] for row in rows]
    numeric = [bool(cells) and all(row[at].kind == "n" for row in cells) for at in range(len(columns))]
    head = "".join(
        f'<th scope="col"{" class=n" if right else ""}><button type="button">{escape(name)}</button></th>'
        for name, right in zip(columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(_td(cell, name) for cell, name in zip(row, columns, strict=True)) + "</tr>\n" for row in cells
    )
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = ' class="cards"' if cards else ""
    made = f'<div class="scroll"><table{kind}>{said}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    return Html(f"<div data-table>{_controls(columns, cells, search, choices)}{made}</div>")


def _controls(columns: Sequence[str], cells: list[list[Cell]], search: str, choices: Sequence[int]) -> str:
    if not search and not choices:
        return ""
    made = f'<label>{escape(search)}<input type="search" autocomplete="off"></label>' if search else ""
    for at in choices:
        values = sorted({str(row[at].value if row[at].value is not None else row[at].shown) for row in cells})
        options = "".join(f"<option>{escape(value)}</option>" for value in values)
        options = f'<option value="">all</option>{options}'
        made += f'<label>{escape(columns[at])}<select data-column="{at}">{options}</select></label>'
    return f'<div class="controls">{made}<output aria-live="polite"></output></div>'


def cell(one: object) -> Cell:
    """What a row gives, as a cell; numbers stand on the right."""
    if isinstance(one, Cell):
        return one
    if isinstance(one, bool) or not isinstance(one, int | float):
        return Cell(one if isinstance(one, str) else str(one))
    return Cell(number(one), one, "n")


def _td(cell: Cell, column: str) -> str:
    value = f' data-value="{escape(str(cell.value))}"' if cell.value is not None else ""
    kind = f' class="{cell.kind}"' if cell.kind else ""
    return f'<td{kind}{value} data-label="{escape(column)}">{shown(cell.shown)}</td>'


def number(value: float) -> str:
    """Whole numbers with thousands apart; others with the digits that matter."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 100):
        return f"{int(value):,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


# Colours that stand in the drawing until the page's variables take their place.
_STAND_INS = {"ink": "#0000f1", "soft": "#0000f2", "line": "#0000f3", "paper": "#0000f4", "bad": "#0000f5"}
SERIES = {"one": "#0000e1", "two": "#0000e2", "three": "#0000e3", "four": "#0000e4"}
_INK, _SOFT, _LINE, _BAD = (_STAND_INS[name] for name in ("ink", "soft", "line", "bad"))
WIDE, HIGH = 4.6, 2.5  # inches at 72 to the inch: near the size that a phone shows, so that letters stay readable
_numbers = count(1)
Values = Sequence[float]


def _draw(fill: Callable[[Any], None], name: str, *, high: float = HIGH) -> Html:
    """name: what a screen reader says."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "sft", "text.parse_math": False, "font.size": 9, "text.color": _INK,
        "axes.labelcolor": _SOFT,
        "xtick.color": _SOFT, "ytick.color": _SOFT, "axes.edgecolor": _LINE, "grid.color": _LINE,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "legend.frameon": False, "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 6),
    }  # fmt: skip
    with mpl.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has letters that the drawing's own font lacks
        figure = Figure(figsize=(WIDE, high), layout="constrained")
        fill(figure.subplots())
        out = io.StringIO()
        bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=bare)
    return _for_page(out.getvalue(), name)


def _for_page(svg: str, name: str) -> Html:
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    mark = f"f{next(_numbers)}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for variable, colour in {**_STAND_INS, **SERIES}.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Html(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1).strip())


def _colours(amount: int) -> list[str]:
    kept = list(SERIES.values())
    return [kept[index % len(kept)] for index in range(amount)]


def histogram(values: Values, label: str, name: str, *, marks: Values = (), log: bool = False, bins: int = 40) -> Html:
    """How often each size comes. marks: upright lines, such as limits."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    def fill(axes: Any) -> None:
        low, high = max(min(values), 1 if log else min(values)), max(values)
        high = max(high, low + 1e-9) if log else high
        edges = np.geomspace(low, high * 1.0001, bins + 1) if log else np.linspace(low, high + 1e-9, bins + 1)
        axes.hist(np.clip(values, low, None), bins=edges, color=SERIES["two"])
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        for mark in (mark for mark in marks if low <= mark <= high):
            axes.axvline(mark, color=_BAD, linewidth=1, linestyle="--")
            axes.text(mark, 1, f"{mark:,.0f}", color=_BAD, rotation=90, va="top", ha="right", fontsize=7,
                      transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_xlabel(label)
        axes.set_ylabel("rows")
        axes.grid(axis="x", visible=False)

    return _draw(fill, name)


def bars(names: Sequence[str], values: Values, label: str, name: str) -> Html:
    """A bar for each name, the first on top."""

    def fill(axes: Any) -> None:
        shown = [one if len(one) <= 34 else one[:33] + "…" for one in names]
        axes.barh(range(len(names)), values, color=SERIES["two"], height=0.7)
        axes.set_yticks(range(len(names)), shown)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    return _draw(fill, name, high=max(1.2, 0.55 + 0.21 * len(names)))


def means(names: Sequence[str], values: Values, intervals: Sequence[tuple[float, float]], name: str) -> Html:
    """A bar for each side with its interval; the first side in grey."""

    def fill(axes: Any) -> None:
        place = range(len(names))
        spread = [
            [max(0.0, v - low) for v, (low, _) in zip(values, intervals, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(values, intervals, strict=True)],
        ]
        axes.barh(place, values, color=_colours(len(names)), height=0.62)
        axes.errorbar(values, place, xerr=spread, fmt="none", ecolor=_INK, elinewidth=1.4, capsize=4)
        axes.set_yticks(place, [one if len(one) <= 18 else one[:17] + "…" for one in names])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=6)
        most = max([*values, *(high for _, high in intervals)])
        axes.set_xlim(min(0.0, *(low for low, _ in intervals)), None if most > 0 else 1)

    return _draw(fill, name, high=0.6 + 0.34 * len(names))


def curves(series: Mapping[str, Sequence[tuple[float, float]]], label: str, name: str) -> Html:
    """Lines over steps; a series of few points shows them."""

    def fill(axes: Any) -> None:
        for (title, points), colour in zip(series.items(), _colours(len(series) + 1)[1:], strict=True):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=1.6, label=title, marker="o" if len(points) < 12 else None,
                      markersize=3.5)  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(series) > 1:
            axes.legend(fontsize=8)

    return _draw(fill, name)
