"""Metrics of text: pure functions over predictions, references and sources; no model, no torch, no network.

score(["rougeL", "sari"], predictions, references, sources)   -> {"rougeL": 0.41, "sari": 38.2}
score_rows(...)                                               -> the same, and each row's value
text_stats(predictions)                                       -> length, repetition, share of empty answers
best_constant(...)                                            -> what one answer to every question would score
"""

from sft.metrics.scoring import Constant, Scores, best_constant, check_names, greater_is_better, score, score_rows
from sft.metrics.text import text_stats

__all__ = [
    "Constant",
    "Scores",
    "best_constant",
    "check_names",
    "greater_is_better",
    "score",
    "score_rows",
    "text_stats",
]
