"""Metrics of text: pure functions over predictions, references and sources; no model, no torch, no network.

score_rows(["rougeL", "sari"], predictions, references, sources).means  -> {"rougeL": 0.41, "sari": 38.2}
text_stats(predictions)        -> length, repetition, share of empty answers
constant_baseline(...)         -> what one and the same answer to every question would score
"""

from sft.metrics.scoring import Scores, check_names, constant_baseline, greater_is_better, score_rows
from sft.metrics.text import text_stats

__all__ = ["Scores", "check_names", "constant_baseline", "greater_is_better", "score_rows", "text_stats"]
