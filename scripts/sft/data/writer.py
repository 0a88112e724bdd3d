"""What process writes: the splits, the quarantine, and the counts that go with each row."""

from __future__ import annotations

from array import array
from contextlib import ExitStack
from pathlib import Path

from sft.data import quarantine, records, rows
from sft.data.faults import RowFault
from sft.data.ledger import Ledger
from sft.data.raw import Raw

FEW = 10_000  # rows below which a split may come out empty, so that one must know which rows cannot be moved


class Leaks:
    """Counts rows of val and test that training rows give away: the same row, or the same question."""

    def __init__(self) -> None:
        self._trained = {"exact": array("q"), "same question": array("q")}
        self._held: dict[str, dict[str, list[int]]] = {"exact": {}, "same question": {}}

    def note(self, split: str, record: records.Row) -> None:
        asked = " ".join(records.question(record).casefold().split())
        for kind, key in (("exact", hash(record["id"])), ("same question", hash(asked))):
            if split == "train":
                self._trained[kind].append(key)
            else:
                self._held[kind].setdefault(split, []).append(key)

    def count(self) -> dict[str, dict[str, int]]:
        """Split -> kind -> rows of it that training gives away."""
        made: dict[str, dict[str, int]] = {}
        for kind, held in self._held.items():
            wanted = {key for keys in held.values() for key in keys}
            given_away = {key for key in self._trained[kind] if key in wanted} if wanted else set()
            for split, keys in held.items():
                made.setdefault(split, {})[kind] = sum(key in given_away for key in keys)
        return made


class Writer:
    """Open files of one run of process. bound: ids of rows that may not be moved to another split."""

    def __init__(self, folder: Path, ledger: Ledger, splits: list[str]) -> None:
        self.folder, self.ledger = folder, ledger
        self.leaks, self.bound = Leaks(), set[str]()
        ledger.splits = dict.fromkeys(splits, 0)
        self._open = ExitStack()
        files = [*splits, "quarantine"]
        self._outs = {name: self._open.enter_context((folder / f"{name}.jsonl").open("wb")) for name in files}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, split: str, record: records.Row, line: bytes, format: str, copies: int) -> None:
        """One row into its split, and into training as often as its source's weight says."""
        self._outs[split].write(line)
        self.ledger.count(record, format, split)
        self.leaks.note(split, record)
        if split != "train" or copies == 1:
            return
        for number in range(2, copies + 1):
            again = {**record, "id": f"{record['id']}-{number}"}
            self._outs[split].write(rows.line(again))
            self.ledger.read += 1
            self.ledger.repeated += 1
            self.ledger.count(again, format, split)
            if self.ledger.written < FEW:
                self.bound |= {record["id"], again["id"]}

    def quarantine(self, raw: Raw, fault: RowFault) -> None:
        """One row that is not used."""
        quarantine.add(self._outs["quarantine"], self.ledger, raw, fault)
