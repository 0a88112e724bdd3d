"""The split of a row, by a seeded hash of its question: equal questions share it, and appended rows move none."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from sft.config.schema import SplitSection
from sft.data.store import SPLITS

MIN_ROWS = 3  # below which a split may stay empty
MIN_JUDGED = 50  # rows that a split should have, and the others too, before its share is judged


def position(key: str, seed: int | str) -> float:
    """The position in [0, 1) of the rows with this key."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def ranges(split: SplitSection) -> dict[str, tuple[float, float]]:
    """The part of [0, 1) that belongs to each split; splits without a share are left out."""
    parts, start = {}, 0.0
    for name, share in zip(SPLITS, (split.train, split.val, split.test), strict=True):
        if share > 0:
            parts[name] = (start, start + share)
        start += share
    return parts


def choose_split(key: str, split: SplitSection) -> str:
    """The split of the rows with this key."""
    at, parts = position(key, split.seed), ranges(split)
    return next((name for name, (_, end) in parts.items() if at < end), list(parts)[-1])


def fill_empty(places: list[Any], prompts: list[int], fixed: set[int], split: SplitSection) -> dict[str, int]:
    """Gives each empty split with a share the row whose hash is nearest to it, from a split that has two; with fewer
    than MIN_ROWS rows only train, from any.

    places: the split of each row (or why it is not used), changed in place. prompts: their prompt ids. fixed: numbers
    of rows that may not move; nor do rows that share their question. Returns split -> number of its new row.
    """
    parts, moved = ranges(split), dict[str, int]()
    for name, (start, end) in parts.items():
        counts = Counter(place for place in places if place in parts)
        few = counts.total() < MIN_ROWS
        if counts[name] or (few and name != "train"):
            continue
        same_prompt = Counter(prompt for prompt, place in zip(prompts, places, strict=True) if place in parts)
        candidates = [
            (max(start - at, at - end), number)
            for number, (prompt, place) in enumerate(zip(prompts, places, strict=True))
            if counts[place] > (not few) and same_prompt[prompt] == 1 and number not in fixed
            for at in [position(f"{prompt:016x}", split.seed)]
        ]
        if candidates:
            moved[name] = min(candidates)[1]
            places[moved[name]] = name
    return moved


def share_warnings(counts: dict[str, int], split: SplitSection) -> list[str]:
    """A warning for each split that is empty, or far from its share because many rows share a question."""
    total, warnings = sum(counts.values()), []
    together = "rows with the same question, or that belong together, stay in one split"
    for name, (start, end) in ranges(split).items():
        expected = (end - start) * total
        if not counts[name]:
            why = f"its share is small, and {together}" if total >= MIN_ROWS else f"{total} rows are too few to split"
            warnings.append(f"{name} is empty: {why}")
        if min(expected, total - expected) >= MIN_JUDGED and not (
            expected / 2 <= counts[name] <= (total + expected) / 2
        ):
            warnings.append(
                f"{name} has {counts[name] / total:.1%} of the rows, not {end - start:.0%}: {together};"
                " try another data.split.seed, or data.split.group_by=KEY"
            )
    return warnings
