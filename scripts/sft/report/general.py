"""What a fine-tune must not unlearn: a small general set with answers that a program can check, and the verdict on it.

A row is {"user", "assistant"} or any other processed row; the assistant's text is a good answer, on which the loss is
measured. `check` says what an answer must be; all that stands in it must hold:
  number: the answer's last number         matches: a pattern (a list: each)    excludes: a pattern that must be absent
  json: the answer is JSON with these keys  max_words, lines: at most so many words; exactly so many lines with text
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from sft.config.paths import shipped
from sft.data import store
from sft.errors import DataError
from sft.metrics.match import number
from sft.report.paired import Difference

SHIPPED = "data/samples/general.jsonl"
MATTERS = 0.1  # nats a token: a perplexity a tenth higher
UNKNOWING = 6.0  # nats a token of good answers above which a base knows next to nothing of them
CHECKS = ("number", "matches", "excludes", "json", "max_words", "lines")
_FLAGS = re.IGNORECASE | re.DOTALL
Row = dict[str, Any]


def read(named: Path | None, root: Path) -> list[Row]:
    """The rows of the user's file, or of the set that is shipped. Raises DataError for a check that cannot be read."""
    rows = store.read_rows(named or shipped(root, SHIPPED))
    for row in rows:
        check = row.get("check", {})
        wrong = sorted(set(check) - set(CHECKS)) if isinstance(check, dict) else [str(check)]
        if wrong:
            mend = f"`check` knows {', '.join(CHECKS)}"
            raise DataError(f"no such check: {', '.join(wrong)}", where=str(row.get("origin")), mend=mend)
        for pattern in _patterns(check, "matches") + _patterns(check, "excludes"):
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(f"{pattern!r} is no pattern: {error}", where=str(row.get("origin"))) from None
    return rows


def _patterns(check: Mapping[str, Any], name: str) -> list[str]:
    given = check.get(name, [])
    return [given] if isinstance(given, str) else list(given)


def passes(answer: str, check: Mapping[str, Any]) -> float:
    """1 where the answer says something and every check holds, else 0; nan without checks."""
    if not check:
        return float("nan")
    text = answer.strip()
    if not text or not all(re.search(one, text, _FLAGS) for one in _patterns(check, "matches")):
        return 0.0
    if any(re.search(one, text, _FLAGS) for one in _patterns(check, "excludes")):
        return 0.0
    if "number" in check and number(text) != Decimal(str(check["number"])):
        return 0.0
    if "max_words" in check and len(text.split()) > check["max_words"]:
        return 0.0
    if "lines" in check and sum(bool(line.strip()) for line in text.splitlines()) != check["lines"]:
        return 0.0
    return float("json" not in check or _is_json(text, check["json"]))


def _is_json(text: str, keys: Sequence[str]) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return set(keys) <= set(found) if isinstance(found, dict) else not keys


def forgetting(loss: Difference, passed: Difference | None) -> tuple[str, str]:
    """The verdict on the general set, by loss a token of good answers and share of checks that hold: level, headline.

    forgotten: the loss has risen by more than MATTERS beyond its interval, or fewer checks hold beyond theirs.
    slight: the loss has risen beyond its interval, by less than that. unknown: too few questions, or the base could
    not answer them in the first place. Else none.
    """
    fewer = passed is not None and passed.finding == "worse"
    if (loss.finding == "worse" and loss.low > MATTERS) or fewer:
        lost = "fewer answers pass their checks" if fewer else "good general answers have become much less likely"
        return "forgotten", f"It has forgotten general abilities: {lost}"
    if loss.finding == "worse":
        return "slight", "Slight forgetting: general answers have become a little less likely"
    if loss.finding == "too few rows":
        return "unknown", "Too few general questions to tell whether it forgot"
    if loss.base > UNKNOWING and (passed is None or passed.base < 0.1):
        return "unknown", "The general questions say little: the base itself cannot answer them"
    return "none", "No sign of forgetting on the general questions"


def figures(loss: Difference, passed: Difference | None) -> str:
    """What the verdict rests on, in words."""
    told = (
        f"perplexity of good answers x{perplexity(loss.difference):.3g} (loss {loss.difference:+.3f}, "
        f"95 % interval {loss.low:+.3f} to {loss.high:+.3f})"
    )
    if passed is None:
        return told
    return (
        f"{told}; checks that hold: {passed.base:.0%}, now {passed.tuned:.0%} (interval of the change "
        f"{passed.low:+.0%} to {passed.high:+.0%}, {passed.rows} questions)"
    )


def perplexity(nats: float) -> float:
    """Of a loss; beyond 50 nats it counts as 50."""
    return math.exp(min(nats, 50.0))
