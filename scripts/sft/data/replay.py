"""Replay: general rows mixed into training, so that the model does not forget what it could before.

Taken are the rows whose seeded hashes come first, until they make up `ratio` of the training rows. They keep their
origin, carry `"replay": true`, stand at the end of the training file (training shuffles), and never reach val or test.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft.config.paths import resolve
from sft.config.schema import DataSection, ReplaySection
from sft.data import records, rows, split
from sft.data.faults import RowFault
from sft.data.formats import Formats
from sft.data.ledger import Ledger
from sft.data.mix import expand
from sft.data.raw import Raw
from sft.errors import DataError

Check = Callable[[records.Row], None]


def mix_in(data: DataSection, root: Path, staged: Path, ledger: Ledger, check: Check) -> None:
    """Adds replay rows to the staged training file and tells it in the ledger; they count as read and written.

    check: raises RowFault for a row that may not be trained on. Raises DataError for a file without a usable row.
    """
    section, train = data.replay, ledger.splits.get("train", 0)
    if section is None or not train:
        return
    wanted = max(1, round(train * section.ratio / (1 - section.ratio)))
    chosen, read, usable = _choose(section, data, root, wanted, check)
    if not chosen:
        mend = "give chat rows in any format of docs/DATA.md, or plain text as {text: ...}"
        raise DataError("data.replay.path holds no row that can be used", where=section.path, mend=mend)
    with (staged / "train.jsonl").open("ab") as out:
        for record, format in chosen:
            out.write(rows.line(record))
            ledger.read += 1
            ledger.replayed += 1
            ledger.count(record, format, "train")
    share = len(chosen) / ledger.splits["train"]
    report = {"path": section.path, "ratio": section.ratio, "rows": read, "usable": usable, "taken": len(chosen)}
    ledger.reports["replay"] = {**report, "share": round(share, 6)}
    if len(chosen) < wanted:
        ledger.said.append(
            f"replay: {section.path} has {usable:,} rows, {wanted:,} were wanted: {share:.1%} of the mix"
        )


def _choose(
    section: ReplaySection, data: DataSection, root: Path, wanted: int, check: Check
) -> tuple[list[tuple[records.Row, str]], int, int]:
    """The rows, how many were read, and how many of them could be used; never more than `wanted` in memory."""
    formats, seen, read = Formats("auto", None), set[str](), 0

    def usable() -> Iterator[tuple[records.Row, str]]:
        nonlocal read
        for source in expand(section.path, resolve(root, section.path), root, section):
            for raw in source.rows():
                read += 1
                try:
                    record, format = _record(raw, formats)
                    check(record)
                except RowFault:
                    continue
                if record["id"] not in seen:
                    seen.add(record["id"])
                    yield {**record, "replay": True}, format

    seed = f"replay {data.split.seed}"
    first = heapq.nsmallest(wanted, usable(), key=lambda one: split.position(one[0]["id"], seed))
    return first, read, len(seen)


def _record(raw: Raw, formats: Formats) -> tuple[records.Row, str]:
    """A chat row, or plain text as a rendered row whose input is empty: loss is taken on all of it."""
    try:
        return rows.record(raw, formats, None)
    except RowFault:
        text: Any = raw.value.get("text") if isinstance(raw.value, dict) else None
        if raw.fault is not None or not isinstance(text, str) or not text.strip():
            raise
        return records.rendered_record("", text, origin=raw.origin), "plain text"
