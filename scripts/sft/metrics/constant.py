"""The best constant answer: what a parrot that says one and the same thing to every question would score.

A tuned model that is no better than it has learnt the tone of the answers and nothing of the task.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sft.metrics import match, rouge
from sft.metrics.scoring import References, as_lists, score
from sft.metrics.text import mean

CANDIDATES = 200
SAMPLE = 400


@dataclass(frozen=True)
class Constant:
    """The training answer that scores best in ROUGE-L, its scores, and the best exact match of any one answer."""

    answer: str
    scores: dict[str, float]


def _candidates(answers: Sequence[str], most: int, seed: int) -> list[str]:
    """Half the most frequent answers, half a seeded draw from the rest."""
    counted = [answer for answer, _ in Counter(answers).most_common()]
    if len(counted) <= most:
        return counted
    rest = counted[most // 2 :]
    return counted[: most // 2] + random.Random(seed).sample(rest, most - most // 2)


def best_constant(
    training_answers: Sequence[str],
    references: References,
    *,
    stemmer: bool = False,
    most: int = CANDIDATES,
    seed: int = 0,
) -> Constant | None:
    """Tries up to `most` training answers against the references (chosen on at most 400 of them, scored on all).

    `scores` has rougeL of the answer that is best in it, and exact_match of the answer that is best in that: no one
    answer can do better in either. None when there is nothing to choose from.
    """
    wanted = as_lists(references)
    candidates = _candidates(training_answers, most, seed)
    if not candidates or not wanted:
        return None
    sample = wanted if len(wanted) <= SAMPLE else random.Random(seed).sample(wanted, SAMPLE)
    by_rouge = [
        mean([rouge.rouge("rougeL", answer, refs, stemmer=stemmer) for refs in sample]) for answer in candidates
    ]
    answer = candidates[by_rouge.index(max(by_rouge))]
    exact = max(mean([match.exact_match(candidate, refs) for refs in wanted]) for candidate in candidates)
    rouge_l = score(["rougeL"], [answer] * len(wanted), wanted, stemmer=stemmer)["rougeL"]
    return Constant(answer, {"rougeL": rouge_l, "exact_match": exact})
