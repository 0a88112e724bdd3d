"""Drawings for a page: matplotlib's SVG, its colours turned into the page's own, so that they follow dark mode.

Each function returns an `<svg>` without an address outside or a size of its own: the page's style gives it one.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import count
from typing import Any

from sft.report.page import Html

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
