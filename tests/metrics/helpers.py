"""A shorter way to score a few rows."""

from __future__ import annotations

from typing import Any

from sft.metrics.scoring import score_rows


def score(*args: Any, **options: Any) -> dict[str, float]:
    """{name: mean} of `score_rows`."""
    return score_rows(*args, **options).means
