"""The tags of rows, by which scores are told apart: which kinds of rows a model is good at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEYS = ("tags", "tag", "category")


def of(row: Mapping[str, Any]) -> list[str]:
    """The tags of a row: its `tags`, `tag` and `category`, each one text or a list of them."""
    found: list[str] = []
    for key in KEYS:
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        found += [str(one) for one in values if isinstance(one, str | int) and str(one).strip()]
    return list(dict.fromkeys(found))


def places(tagged: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """{tag: the rows that have it}, sorted by tag. tagged: each row's tags."""
    groups: dict[str, list[int]] = {}
    for index, names in enumerate(tagged):
        for name in names:
            groups.setdefault(name, []).append(index)
    return dict(sorted(groups.items()))
