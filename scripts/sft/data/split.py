"""The split of a row, by a seeded hash of its question: equal questions share it, and appended rows move none."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sft.config.schema import SplitSection
from sft.data.rows import DECODER, prompt_id
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


def fill_empty(folder: Path, counts: dict[str, int], split: SplitSection, fixed: set[str]) -> dict[str, str]:
    """Gives each empty split with a share the row whose hash is nearest to it, from a split that has two.

    fixed: ids of rows that may not move; nor do rows that share their question. Changes the files in `folder` and
    `counts`; returns split -> id of its row.
    """
    moved: dict[str, str] = {}
    empty = [name for name in ranges(split) if not counts[name]]
    for name in empty if sum(counts.values()) >= MIN_ROWS else ():
        start, end = ranges(split)[name]
        rows = [(donor, number, *ids) for donor in counts for number, ids in enumerate(_ids(folder / f"{donor}.jsonl"))]
        prompts = Counter(prompt for _, _, _, prompt in rows)
        candidates = [
            (max(start - at, at - end), donor, number, row_id)
            for donor, number, row_id, prompt in rows
            if counts[donor] > 1 and prompts[prompt] == 1 and row_id not in fixed
            for at in [position(prompt, split.seed)]
        ]
        if candidates:
            _, donor, number, row_id = min(candidates)
            lines = (folder / f"{donor}.jsonl").read_bytes().splitlines(keepends=True)
            (folder / f"{name}.jsonl").write_bytes(lines.pop(number))
            (folder / f"{donor}.jsonl").write_bytes(b"".join(lines))
            counts[donor], counts[name], moved[name] = counts[donor] - 1, 1, row_id
    return moved


def _ids(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for line in file:
            row = DECODER.decode(line.decode("utf-8"))
            yield row["id"], prompt_id(row)


def share_warnings(counts: dict[str, int], split: SplitSection) -> list[str]:
    """A warning for each split that is far from its share, because many rows share a question and stay together."""
    total, warnings = sum(counts.values()), []
    for name, (start, end) in ranges(split).items():
        expected = (end - start) * total
        if min(expected, total - expected) >= MIN_JUDGED and not (
            expected / 2 <= counts[name] <= (total + expected) / 2
        ):
            warnings.append(
                f"{name} has {counts[name] / total:.1%} of the rows, not {end - start:.0%}: rows with the same"
                " question, or that belong together, stay in one split; try another data.split.seed, or"
                " data.split.group_by=KEY"
            )
    return warnings
