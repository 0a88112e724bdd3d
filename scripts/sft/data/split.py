"""Which split a row goes to: told by a seeded hash of its content, so that a row appended moves no other."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sft.config.schema import SplitSection
from sft.data.strict_json import DECODER

NAMES = ("train", "val", "test")
FEWEST = 3  # rows below which a split may stay empty


def position(row_id: str, seed: int | str) -> float:
    """Where in [0, 1) this row lies."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def ranges(split: SplitSection) -> dict[str, tuple[float, float]]:
    """The part of [0, 1) that each split takes; those with no share are left out."""
    made, start = {}, 0.0
    for name, share in zip(NAMES, (split.train, split.val, split.test), strict=True):
        if share > 0:
            made[name] = (start, start + share)
        start += share
    return made


def choose(row_id: str, split: SplitSection) -> str:
    """The split of this row."""
    at = position(row_id, split.seed)
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
            for number, row_id in enumerate(_ids(folder / f"{other}.jsonl"))
            if row_id not in bound
            for at in [position(row_id, split.seed)]
        )
        nearest = min(candidates, default=None)
        if nearest is None:
            continue
        _, donor, number, row_id = nearest
        _move(folder / f"{donor}.jsonl", folder / f"{name}.jsonl", number)
        counts[donor], counts[name], moved[name] = counts[donor] - 1, 1, row_id
    return moved


def _ids(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [str(DECODER.decode(line)["id"]) for line in file]


def _move(source: Path, target: Path, number: int) -> None:
    staged = source.with_suffix(".part")
    with source.open("rb") as rows, staged.open("wb") as rest:
        for index, line in enumerate(rows):
            if index == number:
                target.write_bytes(line)
            else:
                rest.write(line)
    staged.replace(source)
