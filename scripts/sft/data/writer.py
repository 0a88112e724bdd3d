"""What process writes: the splits, the quarantine, and the counts that go with each row."""

from __future__ import annotations

from array import array
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sft.data import records, rows, strict_json
from sft.data.faults import RowFault
from sft.data.ledger import Ledger
from sft.data.raw import Raw

LONGEST_TEXT = 100_000  # characters of an unreadable row that are kept
FEW = 10_000  # rows below which a split may come out empty, so that one must know which rows cannot be moved


class Leaks:
    """Counts rows of val and test that training rows give away: the same row, or the same question."""

    def __init__(self) -> None:
        self._trained = {"exact": array("Q"), "same question": array("Q")}
        self._held: dict[str, dict[str, list[int]]] = {"exact": {}, "same question": {}}
        self.near: Counter[str] | None = None  # split -> rows nearly the same as one of another; None: not looked for

    def note(self, split: str, record: records.Row, prompt: str) -> None:
        """The next row that is written. prompt: its `records.prompt_id`."""
        for kind, key in (("exact", int(record["id"], 16)), ("same question", int(prompt, 16))):
            if split == "train":
                self._trained[kind].append(key)
            else:
                self._held[kind].setdefault(split, []).append(key)

    def asked(self) -> set[int]:
        """The prompts of val and test."""
        return {key for keys in self._held["same question"].values() for key in keys}

    def count(self) -> dict[str, dict[str, int | None]]:
        """Split -> kind -> rows of it that training gives away; None where that was not looked for."""
        made: dict[str, dict[str, int | None]] = {}
        for kind, held in self._held.items():
            wanted = {key for keys in held.values() for key in keys}
            given_away = {key for key in self._trained[kind] if key in wanted} if wanted else set()
            for split, keys in held.items():
                made.setdefault(split, {})[kind] = sum(key in given_away for key in keys)
                made[split]["near"] = None if self.near is None else self.near[split]
        return made


class Writer(ExitStack):
    """Open files of one run of process. bound: ids of rows that may not be moved to another split."""

    def __init__(self, folder: Path, ledger: Ledger, splits: list[str], leaks: Leaks) -> None:
        super().__init__()
        self.ledger, self.leaks = ledger, leaks
        self.bound = set[str]()
        self._first: dict[str, str] = {}  # prompt -> id of its first row
        ledger.splits = dict.fromkeys(splits, 0)
        files = [*splits, "quarantine"]
        self._outs = {name: self.enter_context((folder / f"{name}.jsonl").open("wb")) for name in files}

    def write(self, split: str, record: records.Row, line: bytes, format: str, copies: int, prompt: str) -> None:
        """One row into its split, and into training as often as its source's weight says."""
        self._outs[split].write(line)
        self.ledger.count(record, format, split)
        self.leaks.note(split, record, prompt)
        if self.ledger.written < FEW and self._first.setdefault(prompt, record["id"]) != record["id"]:
            self.bound |= {record["id"], self._first[prompt]}
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
        """One row that is not used: counted in the ledger, and whole in the quarantine with its reason and place."""
        self.ledger.name(fault.reason, raw.origin, fault.detail)
        entry: dict[str, Any] = {"reason": fault.reason, "detail": fault.detail, "origin": raw.origin}
        try:
            kept = {"text": raw.text[:LONGEST_TEXT]} if raw.text is not None else {"row": raw.value}
            line = strict_json.dumps(entry | kept)
        except (TypeError, ValueError):  # half surrogates, bytes: shown with escapes
            shown = raw.text if raw.text is not None else repr(raw.value)
            told = {"detail": _printable(fault.detail), "text": _printable(shown[:LONGEST_TEXT])}
            line = strict_json.dumps(entry | told)
        self._outs["quarantine"].write(line + b"\n")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
