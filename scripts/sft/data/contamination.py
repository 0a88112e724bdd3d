"""Rows that hold a benchmark's rows: training on them would make its score worthless.

A row is contaminated when it shares a run of `ngram` words with a benchmark row, or has its question word for word.
Runs in more than COMMON benchmark rows (a shared prompt) prove nothing and are left out, as in Brown et al. 2020,
"Language Models are Few-Shot Learners", appendix C, which uses 13 words too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.load import resolve_path
from sft.config.schema import ContaminationSection, SourceSection
from sft.data import rows
from sft.data.dedup import WordHasher, ngram_hashes
from sft.data.formats import Formats, make_row
from sft.data.readers import Source
from sft.data.rows import RowFault
from sft.data.sources import open_part

COMMON = 10  # benchmark rows that may share a run of words before it counts as boilerplate
MIN_WORDS = 3  # of a question that is compared as a whole: "why" belongs to no benchmark


class Contamination:
    """The words of all benchmark files, read once; `check` then looks for them in one training row at a time."""

    def __init__(self, section: ContaminationSection, root: Path) -> None:
        """Raises DataError for a file that does not exist or holds no rows."""
        self.ngram, self._words = section.ngram, WordHasher()
        self.benchmarks: list[dict[str, Any]] = []  # name, rows, hits: training rows that hold some of it
        self._runs: dict[int, tuple[dict[str, Any], str]] = {}  # hash of a run -> benchmark, origin of the row
        self._questions: dict[int, tuple[dict[str, Any], str]] = {}
        for path in section.against:
            entry = SourceSection(path=path, hub_split="test")
            for source in open_part(path, resolve_path(root, path), root, entry).sources:
                self._add(source)

    def _add(self, source: Source) -> None:
        benchmark: dict[str, Any] = {"name": source.name, "rows": 0, "hits": 0}
        self.benchmarks.append(benchmark)
        seen: Counter[int] = Counter()
        for origin, question, text in _texts(source):
            benchmark["rows"] += 1
            runs = set(self._hashes_of_runs(text))
            seen.update(runs)
            for run in runs:
                self._runs.setdefault(run, (benchmark, origin))
            if whole := self._question(question):
                self._questions.setdefault(whole, (benchmark, origin))
        for run, count in seen.items():
            if count > COMMON and self._runs[run][0] is benchmark:
                del self._runs[run]

    def check(self, row: rows.Row) -> None:
        """Raises RowFault (contamination) for a row that holds a benchmark's."""
        match, how = self._questions.get(self._question(rows.question(row)) or 0), "has the question of"
        if match is None:
            runs = self._hashes_of_runs(rows.comparison_text(row))
            match = next((self._runs[run] for run in runs if run in self._runs), None)
            how = f"shares {self.ngram} words in a row with"
        if match is not None:
            match[0]["hits"] += 1
            raise RowFault("contamination", f"{how} {match[1]}")

    def _hashes_of_runs(self, text: str) -> list[int]:
        words = self._words.hashes(text)
        return ngram_hashes(words, self.ngram).tolist() if len(words) >= self.ngram else []

    def _question(self, text: str) -> int | None:
        words = self._words.hashes(text)
        return int(ngram_hashes(words, len(words))[0]) if len(words) >= MIN_WORDS else None

    def report(self) -> dict[str, Any]:
        """For the ledger."""
        return {"ngram": self.ngram, "against": self.benchmarks}


def _texts(source: Source) -> Iterator[tuple[str, str, str]]:
    """Origin, question and text of each row; of a row in no known format all its strings, the first as the question."""
    formats = Formats("auto", None)
    for raw in source.rows():
        try:
            row, _ = make_row(raw, formats, None)
            yield raw.origin, rows.question(row), rows.comparison_text(row)
        except RowFault:
            if texts := list(_strings(raw.value)):
                yield raw.origin, texts[0], "\n".join(texts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)
