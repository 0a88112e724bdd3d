"""What rows are like: lengths, scripts, boilerplate and control characters. Told in the ledger, dropped when asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.data import rows as records
from sft.data.ledger import DROPS, RowFault

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
BOILERPLATE = (
    "as an ai language model", "as a language model", "as an ai assistant", "as an artificial intelligence",
    "as an ai,", "i'm just an ai", "i am just an ai", "i'm sorry, but i can", "i am sorry, but i can",
    "i'm unable to assist", "i cannot assist with", "i can't assist with", "i cannot fulfill", "my knowledge cutoff",
    "my training data only", "openai's content policy", "i do not have personal opinions",
)  # fmt: skip
SAMPLE = 300  # characters of question and answer each by which the script is told
SCRIPTS = {
    "kana": "\u3040-\u30ff",
    "han": "\u3400-\u9fff",
    "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "cyrillic": "\u0400-\u052f",
    "greek": "\u0370-\u03ff",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u077f",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
}
PATTERNS = {name: re.compile(f"[{span}]") for name, span in SCRIPTS.items()}
FENCE = 3  # times the spread between the quarters, on a scale of logarithms: Tukey's far-out fence
LEAST_SPREAD = 2.0  # ratio of the quarters below which it counts as that
EVEN = 0.5  # share of all text in the longest tenth of the rows above which lengths are uneven


@dataclass
class Look:
    """What one row is like. size: characters of all its turns. flags: names of data.drop that it earns by itself."""

    size: int
    answers: int
    script: str
    flags: tuple[str, ...]


def look(row: records.Row) -> Look:
    """Looks at one stored row."""
    if records.is_rendered(row):
        turns = [("user", str(row["input"])), ("assistant", str(row["target"]))]
    else:
        turns = [(turn["role"], str(turn["content"] or "")) for turn in records.messages(row)]
    answer = "\n".join(text for role, text in turns if role == "assistant")
    asked = "\n".join(text for role, text in turns if role != "assistant")
    flags = []
    if CONTROL.search(answer) or CONTROL.search(asked):
        flags.append("control_characters")
    low = answer.lower().replace("\u2019", "'")
    if any(phrase in low for phrase in BOILERPLATE):
        flags.append("boilerplate")
    sample = next((text for role, text in turns if role == "user"), "")[:SAMPLE] + answer[:SAMPLE]
    return Look(len(asked) + len(answer), len(answer), script_of(sample), tuple(flags))


def script_of(text: str) -> str:
    """The script of most letters; Japanese where kana are a tenth of them; "none" without letters."""
    if text.isascii():
        return "latin" if PATTERNS["latin"].search(text) else "none"
    counts = {name: len(pattern.findall(text)) for name, pattern in PATTERNS.items()}
    most = max(counts, key=lambda name: counts[name])
    if counts["kana"] * 10 >= sum(counts.values()) > 0:
        return "kana"
    return most if counts[most] else "none"


@dataclass
class Profile:
    """The looks of all rows that passed the checks so far."""

    sizes: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    _settled: tuple[float, float, str] | None = None

    def add(self, one: Look) -> None:
        self.sizes[one.size] += 1
        self.answers[one.answers] += 1
        self.scripts[one.script] += 1

    def fences(self) -> tuple[float, float]:
        """Sizes below and above which a row is an outlier."""
        low, high = (max(1, size) for size in quantiles(self.sizes, (0.25, 0.75)))
        spread = max(high / low, LEAST_SPREAD) ** FENCE
        return low / spread, high * spread

    def main_script(self) -> str:
        """The script of most rows."""
        return max(self.scripts, key=lambda name: self.scripts[name], default="none")

    def check(self, one: Look, drop: Sequence[str]) -> None:
        """Raises RowFault for a row that stands out from the others in a way that is to be dropped."""
        if self._settled is None:  # all rows are in by now
            self._settled = (*self.fences(), self.main_script())
        low, high, script = self._settled
        if "length_outliers" in drop and not low <= one.size <= high:
            raise RowFault(DROPS["length_outliers"], f"{one.size:,} characters, outside {low:,.0f} to {high:,.0f}")
        if "script" in drop and one.script not in (script, "none"):
            raise RowFault(DROPS["script"], f"its script is {one.script}, that of most rows {script}")

    def report(self) -> dict[str, Any]:
        """For the ledger; lengths in characters."""
        low, high = self.fences()
        outliers = sum(count for size, count in self.sizes.items() if not low <= size <= high)
        shares = (0.05, 0.5, 0.95, 1.0)
        lengths = {
            name: dict(zip(("p5", "median", "p95", "longest"), quantiles(counts, shares), strict=True))
            for name, counts in (("rows", self.sizes), ("answers", self.answers))
        }
        flags = {name: self.flags.get(name, 0) for name in ("control_characters", "boilerplate")}
        others = sum(self.scripts.values()) - self.scripts[self.main_script()] - self.scripts["none"]
        quality = {**flags, "length_outliers": outliers, "script": others}
        scripts = dict(sorted(self.scripts.items(), key=lambda item: (-item[1], item[0])))
        return {"quality": quality, "scripts": scripts, "lengths": lengths, "balance": self.balance()}

    def balance(self) -> str:
        """One sentence on how even the lengths are."""
        total, rows = sum(size * count for size, count in self.sizes.items()), sum(self.sizes.values())
        if not rows or not total:
            return "no text"
        left, held = max(1, rows // 10), 0
        for size in sorted(self.sizes, reverse=True):
            taken = min(left, self.sizes[size])
            held, left = held + taken * size, left - taken
        share = f"the longest tenth of the rows holds {held / total:.0%} of the text"
        median, longest = quantiles(self.sizes, (0.5, 1.0))
        words = "lengths are even" if held <= EVEN * total else "lengths are uneven: few rows weigh most in the loss"
        return f"{words}; {share}, half have up to {median:,} characters, the longest {longest:,}"


def drop_flags(one: Look, drop: Sequence[str]) -> None:
    """Raises RowFault for a row with a mark of its own that is to be dropped."""
    for name in one.flags:
        if name in drop:
            words = {"control_characters": "it holds control or replacement characters"}
            raise RowFault(DROPS[name], words.get(name, "the answer speaks of itself as a model, or refuses"))


def quantiles(counts: Counter[int], shares: Sequence[float]) -> list[int]:
    """The values below or at which these shares of all counted lie."""
    total, made = sum(counts.values()), []
    for share in shares:
        so_far, found = 0, 0
        for found in sorted(counts):
            so_far += counts[found]
            if so_far >= share * total:
                break
        made.append(found)
    return made
