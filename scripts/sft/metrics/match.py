"""Does the answer say the same thing: exact match in four strengths, token F1, and the number at the end.

All give 0 or 1 a row (token F1 a share); of several references the best one counts. Whitespace around an answer never
matters.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<!\w)-)?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}\b)?")  # 10-12 has no sign
_MARKED = re.compile(rf"####\W*?({_NUMBER.pattern})")
_NO_DIGITS = str.maketrans("", "", ",$€£")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer is a reference, letter by letter."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles (a, an, the), single spaces.

    Source: the official SQuAD evaluation script (Rajpurkar et al. 2016), `normalize_answer`.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match_normalised(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer is a reference after SQuAD's normalisation."""
    return float(normalise(prediction) in {normalise(reference) for reference in references})


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 over the bag of normalised words; two empty texts agree (SQuAD 2.0)."""
    found = normalise(prediction).split()
    return max(_token_f1(found, normalise(reference).split()) for reference in references)


def _token_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def contains(prediction: str, references: Sequence[str]) -> float:
    """1 when a reference stands somewhere in the answer, upper and lower case alike."""
    text = prediction.strip().casefold()
    wanted = [reference.strip().casefold() for reference in references]
    return float(any(reference in text if reference else not text for reference in wanted))


def number(text: str) -> Decimal | None:
    """The answer's number: the one after `####` as GSM8K writes it, else the last one in the text; None without one.

    Commas in it and $, € or £ before it do not count; units behind it are no part of it; 1e3 is 1000.
    """
    text = text.replace("\u2212", "-")
    marked = _MARKED.search(text)
    found = [marked.group(1)] if marked else _NUMBER.findall(text)
    return Decimal(found[-1].translate(_NO_DIGITS)) if found else None


def numeric(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer's number is the reference's (`1,000` is `1000.0`); 0 when the reference has none."""
    found = number(prediction)
    return float(found is not None and any(number(reference) == found for reference in references))
