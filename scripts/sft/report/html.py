"""One self-contained HTML page: style, script and charts inside it; good on a phone, in the dark and on paper.

`render("compare.html.j2", "Title", **values)` fills a template of templates/. Everything is escaped; only `Markup` that
this file or a page made is HTML. The page's policy forbids every request and every script but its own, so no text in
it, whoever wrote it, can run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, cycle
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Path(__file__).parent / "templates"
Values = Sequence[float]
Rows = Sequence[Sequence[object]]


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, the value it is sorted and filtered by, and its CSS class ("n" for a number)."""

    shown: str
    value: float | str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption and its numbers."""

    svg: Markup
    title: str
    columns: Sequence[str]
    rows: Rows
    words: str = ""


def render(template: str, title: str, **values: Any) -> str:
    """The whole page. template: a file of templates/."""
    environment = _environment()
    body = environment.get_template(template).render(**values)
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        title=title,
        headings=[(id_, Markup(name)) for id_, name in re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', body)],
        body=Markup(body),
        script=Markup(script),
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        digest=f"sha256-{digest}",
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "cells": lambda rows: [[cell(value) for value in row] for row in rows],
        "distinct": _distinct,
        "numeric": lambda rows, at: bool(rows) and all(row[at].kind == "n" for row in rows),
        "slug": lambda title: "s-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
        "number": number,
        "plain": plain,
        "percent": lambda share: Cell(f"{share:.2%}" if share < 0.1 else f"{share:.1%}", share, "n"),
    }  # fmt: skip
    return environment


def _distinct(rows: Sequence[Sequence[Cell]], column: int) -> list[str]:
    """The different values of a column, sorted: what its list filters by."""
    cells = [row[column] for row in rows]
    return sorted({str(cell.shown if cell.value is None else cell.value) for cell in cells})


def cell(value: object) -> Cell:
    """A table's value as a cell; numbers are aligned right."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(value if isinstance(value, str) else str(value))
    return Cell(number(value), value, "n")


def number(value: float) -> str:
    """Whole numbers with thousands separators; others with the digits that matter."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 100):
        return f"{int(value):,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def plain(value: Any) -> str:
    """A value of a ledger or a summary in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(entry)}" for name, entry in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


# Placeholder colours in a chart; each becomes a CSS variable of the page, so that charts follow the dark mode.
_INK, _SOFT, _LINE, _BAD = "#0000f1", "#0000f2", "#0000f3", "#0000f5"
_SERIES = ("#0000e1", "#0000e2", "#0000e3", "#0000e4")
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line", _BAD: "bad"} | dict(
    zip(_SERIES, ("one", "two", "three", "four"), strict=True)
)
WIDTH, HEIGHT = 4.6, 2.5  # inches at 72 points: near the size that a phone shows, so that letters stay readable
_chart_ids = count(1)


def _draw(fill: Callable[[Any], None], label: str, *, height: float = HEIGHT) -> Markup:
    """An SVG with the page's colours. label: what a screen reader says."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "sft", "text.parse_math": False, "font.size": 9, "text.color": _INK,
        "axes.labelcolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT, "axes.edgecolor": _LINE,
        "grid.color": _LINE, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "legend.frameon": False, "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 6),
    }  # fmt: skip
    with mpl.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has letters that matplotlib's font lacks
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        fill(figure.subplots())
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = out.getvalue()
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{next(_chart_ids)}-", svg)  # ids stay unique in a page
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip())


def histogram(values: Values, axis: str, label: str, *, limits: Values = (), log: bool = False) -> Markup:
    """How often each size occurs. limits: vertical lines with their number."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    def fill(axes: Any) -> None:
        low, high = max(min(values), 1 if log else min(values)), max(values)
        high = max(high, low + 1e-9) if log else high
        edges = np.geomspace(low, high * 1.0001, 41) if log else np.linspace(low, high + 1e-9, 41)
        axes.hist(np.clip(values, low, None), bins=edges, color=_SERIES[1])
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        for limit in (limit for limit in limits if low <= limit <= high):
            axes.axvline(limit, color=_BAD, linewidth=1, linestyle="--")
            axes.text(limit, 1, f"{limit:,.0f}", color=_BAD, rotation=90, va="top", ha="right", fontsize=7,
                      transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_xlabel(axis)
        axes.set_ylabel("rows")
        axes.grid(axis="x", visible=False)

    return _draw(fill, label)


def bars(names: Sequence[str], values: Values, axis: str, label: str, *, intervals: Rows = ()) -> Markup:
    """A horizontal bar for each name, the first on top. intervals: (low, high) of each; then a colour a bar."""

    def fill(axes: Any) -> None:
        places, longest = range(len(names)), 18 if intervals else 34
        axes.barh(places, values, color=_SERIES if intervals else _SERIES[1], height=0.66)
        axes.set_yticks(places, [name if len(name) <= longest else name[: longest - 1] + "…" for name in names])
        axes.invert_yaxis()
        axes.set_xlabel(axis)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        if intervals:
            lows, highs = zip(*intervals, strict=True)
            below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
            above = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
            axes.errorbar(values, places, xerr=[below, above], fmt="none", ecolor=_INK, elinewidth=1.4, capsize=4)
            axes.locator_params(axis="x", nbins=6)
            axes.set_xlim(min(0.0, *lows), None if max([*values, *highs]) > 0 else 1)

    return _draw(fill, label, height=max(1.2, 0.55 + (0.34 if intervals else 0.21) * len(names)))


def curves(series: Mapping[str, Sequence[tuple[float, float]]], axis: str, label: str) -> Markup:
    """Lines over steps; a series of few points shows its points."""

    def fill(axes: Any) -> None:
        for (title, points), colour in zip(series.items(), cycle([*_SERIES[1:], _SERIES[0]])):
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 12 else None
            axes.plot(steps, values, color=colour, linewidth=1.6, label=title, marker=marker, markersize=3.5)
        axes.set_xlabel("step")
        axes.set_ylabel(axis)
        if len(series) > 1:
            axes.legend(fontsize=8)

    return _draw(fill, label)
