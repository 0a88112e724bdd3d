"""Which split a row goes to: told by a seeded hash of what it asks, so that a row appended moves no other, and rows
that ask the same never stand on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from sft.config.schema import SplitSection
from sft.data import rows as records
from sft.data.readers import DECODER

NAMES = ("train", "val", "test")
FEWEST = 3  # rows below which a split may stay empty
ENOUGH = 50  # rows that a split should have, and the others too, before its share is judged


def position(key: str, seed: int | str) -> float:
    """Where in [0, 1) the rows of this key lie."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def ranges(split: SplitSection) -> dict[str, tuple[float, float]]:
    """The part of [0, 1) that each split takes; those with no share are left out."""
    made, start = {}, 0.0
    for name, share in zip(NAMES, (split.train, split.val, split.test), strict=True):
        if share > 0:
            made[name] = (start, start + share)
        start += share
    return made


def choose(key: str, split: SplitSection) -> str:
    """The split of the rows of this key."""
    at = position(key, split.seed)
    taken = ranges(split)
    return next((name for name, (_, end) in taken.items() if at < end), list(taken)[-1])


def fill_empty(folder: Path, counts: dict[str, int], split: SplitSection, bound: set[str]) -> dict[str, str]:
    """Gives each split that has a share and no row the row whose hash lies nearest to it, from a split that has two.

    bound: ids of rows that stay where they are. Changes the files in `folder` and `counts`; returns split -> the id
    of the row it got.
    """
    moved: dict[str, str] = {}
    if sum(counts.values()) < FEWEST:
        return moved
    for name, (start, end) in ranges(split).items():
        if counts[name]:
            continue
        donors = [other for other in counts if counts[other] > 1]
        candidates = (
            (max(start - at, at - end), other, number, row_id)
            for other in donors
            for number, row in enumerate(_rows(folder / f"{other}.jsonl"))
            if (row_id := str(row["id"])) not in bound
            for at in [position(records.prompt_id(row), split.seed)]
        )
        nearest = min(candidates, default=None)
        if nearest is None:
            continue
        _, donor, number, row_id = nearest
        _move(folder / f"{donor}.jsonl", folder / f"{name}.jsonl", number)
        counts[donor], counts[name], moved[name] = counts[donor] - 1, 1, row_id
    return moved


def uneven(counts: dict[str, int], split: SplitSection) -> list[str]:
    """What must be said where a split is far from its share, because many rows ask the same and stay together."""
    total, said = sum(counts.values()), []
    for name, (start, end) in ranges(split).items():
        wanted = (end - start) * total
        if min(wanted, total - wanted) >= ENOUGH and not wanted / 2 <= counts[name] <= (total + wanted) / 2:
            why = "rows that ask the same, or belong together, stay in one split"
            fix = "another data.split.seed, or data.split.group_by=KEY, tells rows apart otherwise"
            said.append(f"{name} has {counts[name] / total:.1%} of the rows, not {end - start:.0%}: {why}; {fix}")
    return said


def _rows(path: Path) -> Iterator[records.Row]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield DECODER.decode(line)


def _move(source: Path, target: Path, number: int) -> None:
    staged = source.with_suffix(".part")
    with source.open("rb") as rows, staged.open("wb") as rest:
        for index, line in enumerate(rows):
            if index == number:
                target.write_bytes(line)
            else:
                rest.write(line)
    staged.replace(source)
