"""What rows are like: lengths, scripts, boilerplate and control characters; reported, and dropped by data.drop."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from sft.data import rows
from sft.data.ledger import DROPS
from sft.data.rows import RowFault

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
MOJIBAKE = re.compile("\u00e2\u20ac|\u00c3[\x80-\xbf]")  # UTF-8 read as Windows text: `â€™`, `Ã©`
PLACEHOLDER = re.compile(r"\{\{ *[A-Za-z]\w* *\}\}")
BOILERPLATE = (
    "as an ai language model", "as a language model", "as an ai assistant", "as an artificial intelligence",
    "as an ai,", "i'm just an ai", "i am just an ai", "i'm sorry, but i can", "i am sorry, but i can",
    "i'm unable to assist", "i cannot assist with", "i can't assist with", "i cannot fulfill", "my knowledge cutoff",
    "my training data only", "openai's content policy", "i do not have personal opinions",
)  # fmt: skip
FLAGS = {
    "control_characters": "it holds control or replacement characters, or wrongly decoded ones (`â€™`, `Ã©`)",
    "placeholders": "it holds a placeholder that is not filled in",
    "boilerplate": "the answer calls itself a model, or refuses",
}
SAMPLE = 300  # characters of question and answer each that show the script
SCRIPTS = {
    name: re.compile(f"[{span}]")
    for name, span in (
        ("kana", "\u3040-\u30ff"), ("han", "\u3400-\u9fff"), ("hangul", "\uac00-\ud7af\u1100-\u11ff"),
        ("cyrillic", "\u0400-\u052f"), ("greek", "\u0370-\u03ff"), ("hebrew", "\u0590-\u05ff"),
        ("arabic", "\u0600-\u077f"), ("devanagari", "\u0900-\u097f"), ("thai", "\u0e00-\u0e7f"),
        ("latin", "A-Za-z\u00c0-\u024f\u1e00-\u1eff"),
    )
}  # fmt: skip
FENCE = 3  # times the interquartile range of the logarithms: Tukey's far-out fence
MIN_SPREAD = 2.0  # ratio of the quartiles, at least
EVEN = 0.5  # share of all text in the longest tenth of the rows up to which lengths are even


class RowStats(NamedTuple):
    """One row. size: characters of all turns; answers: of the answers. flags: names of data.drop that it deserves."""

    size: int
    answers: int
    script: str
    flags: tuple[str, ...]


def row_stats(row: rows.Row) -> RowStats:
    """What one stored row is like by itself."""
    answer = "\n".join(rows.texts(row, "assistant"))
    prompt = "\n".join(rows.texts(row, "system", "user", "tool"))
    garbled = (pattern.search(text) for text in (answer, prompt) for pattern in (CONTROL, MOJIBAKE))
    flags = ["control_characters"] if any(garbled) else []
    if PLACEHOLDER.search(answer) or PLACEHOLDER.search(prompt):
        flags.append("placeholders")
    lower = answer.lower().replace("\u2019", "'")
    if any(phrase in lower for phrase in BOILERPLATE):
        flags.append("boilerplate")
    script = script_of(rows.question(row)[:SAMPLE] + answer[:SAMPLE])
    return RowStats(len(prompt) + len(answer), len(answer), script, tuple(flags))


def script_of(text: str) -> str:
    """The script of most letters; Japanese where kana are a tenth of them; "none" without letters."""
    if text.isascii():
        return "latin" if SCRIPTS["latin"].search(text) else "none"
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    most = max(counts, key=lambda name: counts[name])
    if counts["kana"] * 10 >= sum(counts.values()) > 0:
        return "kana"
    return most if counts[most] else "none"


def check_flags(stats: RowStats, drop: Sequence[str]) -> None:
    """Raises RowFault for a row with a flag that is to be dropped."""
    for name in stats.flags:
        if name in drop:
            raise RowFault(DROPS[name], FLAGS[name])


@dataclass
class DataProfile:
    """Counts over all rows that passed the checks. To be read when all rows are in."""

    sizes: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, stats: RowStats) -> None:
        self.sizes[stats.size] += 1
        self.answers[stats.answers] += 1
        self.scripts[stats.script] += 1

    @cached_property
    def fences(self) -> tuple[float, float]:
        """Sizes below and above which a row is an outlier."""
        low, high = (max(1, size) for size in quantiles(self.sizes, (0.25, 0.75)))
        spread = max(high / low, MIN_SPREAD) ** FENCE
        return low / spread, high * spread

    @cached_property
    def script(self) -> str:
        """The script of most rows."""
        return max(self.scripts, key=self.scripts.__getitem__, default="none")

    def check(self, size: int, script: str, drop: Sequence[str]) -> None:
        """Raises RowFault for a row that differs from the others in a way that is to be dropped."""
        low, high = self.fences
        if "length_outliers" in drop and not low <= size <= high:
            raise RowFault(DROPS["length_outliers"], f"{size:,} characters, outside {low:,.0f} to {high:,.0f}")
        if "script" in drop and script not in (self.script, "none"):
            raise RowFault(DROPS["script"], f"its script is {script}, that of most rows {self.script}")

    def report(self) -> dict[str, Any]:
        """For the ledger; lengths in characters."""
        low, high = self.fences
        outliers = sum(count for size, count in self.sizes.items() if not low <= size <= high)
        lengths = {
            name: dict(zip(("p5", "median", "p95", "longest"), quantiles(counts, (0.05, 0.5, 0.95, 1)), strict=True))
            for name, counts in (("rows", self.sizes), ("answers", self.answers))
        }
        flags = {name: self.flags[name] for name in FLAGS}
        others = sum(count for script, count in self.scripts.items() if script not in (self.script, "none"))
        quality = {**flags, "length_outliers": outliers, "script": others}
        scripts = dict(sorted(self.scripts.items(), key=lambda item: (-item[1], item[0])))
        return {"quality": quality, "scripts": scripts, "lengths": lengths, "balance": self._balance()}

    def _balance(self) -> str:
        """One sentence on how even the lengths are."""
        total, count = sum(size * number for size, number in self.sizes.items()), sum(self.sizes.values())
        if not total:
            return "no text"
        left, held = max(1, count // 10), 0
        for size in sorted(self.sizes, reverse=True):
            taken = min(left, self.sizes[size])
            held, left = held + taken * size, left - taken
        share = f"the longest tenth of the rows holds {held / total:.0%} of the text"
        median, longest = quantiles(self.sizes, (0.5, 1))
        words = "lengths are even" if held <= EVEN * total else "lengths are uneven: few rows weigh most in the loss"
        return f"{words}; {share}, half have up to {median:,} characters, the longest {longest:,}"


def quantiles(counts: Counter[int], shares: Sequence[float]) -> list[int]:
    """The values at or below which these shares (0-1) of everything counted lie; 0 if nothing is."""
    values = sorted(counts) or [0]
    up_to = list(itertools.accumulate(counts[value] for value in values))
    return [values[min(bisect_left(up_to, share * up_to[-1]), len(values) - 1)] for share in shares]
