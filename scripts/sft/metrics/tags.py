"""Scores by tag: which kinds of rows a model is good at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft.metrics.text import mean

KEYS = ("tags", "tag", "category")


def of(row: Mapping[str, Any]) -> list[str]:
    """The tags of a row: its `tags`, `tag` and `category`, each one text or a list of them."""
    found: list[str] = []
    for key in KEYS:
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        found += [str(one) for one in values if isinstance(one, str | int) and str(one).strip()]
    return list(dict.fromkeys(found))


def by_tag(tags: Sequence[Sequence[str]], rows: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """{tag: {"rows": how many, metric: its mean over them}}; a row of several tags counts for each of them."""
    groups: dict[str, list[int]] = {}
    for index, names in enumerate(tags):
        for name in names:
            groups.setdefault(name, []).append(index)
    return {
        name: {"rows": len(where)} | {metric: mean([values[at] for at in where]) for metric, values in rows.items()}
        for name, where in sorted(groups.items())
    }
