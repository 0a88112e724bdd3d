"""Rows that hold a benchmark's rows: training on them would make its score worthless.

A row is contaminated when it shares a run of `ngram` words with a benchmark row, or asks a benchmark's question word
for word. Runs that stand in more than COMMON benchmark rows (a prompt that all share) tell nothing and are left out, as
in Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C, which takes 13 words too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sft.config.load import display_path, resolve_path
from sft.config.schema import ContaminationSection, SourceSection
from sft.data import readers
from sft.data import rows as records
from sft.data.dedup import Words, runs, text_of
from sft.data.formats import Formats
from sft.data.ledger import CONTAMINATION, RowFault
from sft.data.rows import record as make_record
from sft.data.sources import expand

COMMON = 10  # benchmark rows that may share a run before it counts as boilerplate
FEWEST_WORDS = 3  # of a question that is compared as a whole: "why" is nobody's benchmark


@dataclass
class Benchmark:
    """One file of `data.contamination.against`. hits: training rows that hold some of it."""

    name: str
    rows: int = 0
    hits: int = 0


@dataclass
class Contamination:
    """Looks for benchmark rows in training rows, one row at a time."""

    ngram: int
    benchmarks: list[Benchmark] = field(default_factory=list)
    _words: Words = field(default_factory=Words)
    _where: dict[int, tuple[int, str]] = field(default_factory=dict)  # hash of a run -> benchmark, origin
    _questions: dict[int, tuple[int, str]] = field(default_factory=dict)
    _runs: Any = None

    def check(self, row: records.Row) -> None:
        """Raises RowFault (contamination) for a row that holds a benchmark's."""
        found = self._questions.get(self._question(records.question(row)) or 0)
        how = "asks the question of"
        if found is None:
            found, how = self._shared(text_of(row)), f"shares {self.ngram} words in a row with"
        if found is not None:
            self.benchmarks[found[0]].hits += 1
            raise RowFault(CONTAMINATION, f"{how} {found[1]}")

    def _shared(self, text: str) -> tuple[int, str] | None:
        hashes = self._words.hashes(text)
        if len(hashes) < self.ngram:
            return None
        made = runs(np.array(hashes, np.uint64), self.ngram)
        at = np.searchsorted(self._runs, made)
        hits = made[(at < len(self._runs)) & (self._runs[np.minimum(at, len(self._runs) - 1)] == made)]
        return self._where[int(hits[0])] if len(hits) else None

    def _question(self, text: str) -> int | None:
        hashes = self._words.hashes(text)
        return int(runs(np.array(hashes, np.uint64), len(hashes))[0]) if len(hashes) >= FEWEST_WORDS else None

    def learn(self, name: str, rows: Iterator[tuple[str, str, str]]) -> None:
        """Takes in one benchmark: origin, question and whole text of each row."""
        number = len(self.benchmarks)
        self.benchmarks.append(Benchmark(name))
        seen: dict[int, int] = {}
        for origin, question, text in rows:
            self.benchmarks[number].rows += 1
            hashes = self._words.hashes(text)
            if len(hashes) >= self.ngram:
                for run in set(runs(np.array(hashes, np.uint64), self.ngram).tolist()):
                    seen[run] = seen.get(run, 0) + 1
                    self._where.setdefault(run, (number, origin))
            if whole := self._question(question):
                self._questions.setdefault(whole, (number, origin))
        for run, count in seen.items():
            if count > COMMON and self._where[run][0] == number:
                del self._where[run]
        self._runs = np.array(sorted(self._where), np.uint64) if self._where else np.zeros(1, np.uint64)

    def report(self) -> dict[str, Any]:
        """For the ledger."""
        return {"ngram": self.ngram, "against": [asdict(one) for one in self.benchmarks]}


def load(section: ContaminationSection, root: Path) -> Contamination | None:
    """All benchmark files, read; None where there are none. Raises DataError for a file that is not there."""
    made = Contamination(section.ngram)
    for path in section.against:
        for one in expand(path, resolve_path(root, path), root, SourceSection(path=path, hub_split="test")):
            made.learn(one.name if one.path is None else display_path(one.path, root), _texts(one))
    return made if made.benchmarks else None


def _texts(one: readers.Source) -> Iterator[tuple[str, str, str]]:
    """Rows in any format of ours by their question and turns; of other rows all texts, the first as the question."""
    formats = Formats("auto", None)
    for raw in one.rows():
        try:
            row, _ = make_record(raw, formats, None)
            yield raw.origin, records.question(row), text_of(row)
        except RowFault:
            texts = list(_strings(raw.value))
            if texts:
                yield raw.origin, texts[0], "\n".join(texts)


def _strings(value: Any) -> Iterator[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, str):
        yield value
    for item in inner:
        yield from _strings(item)
