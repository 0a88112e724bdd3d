"""All raw rows of a run: one source, a folder of files, or several sources, each with a weight and a limit.

Which rows a weight below one or a limit takes is told by a seeded hash of the row, so that it is the same on every
machine and a row appended moves few others. Weights count repetitions and not shares of the mix: 1 is every row once,
so that a source says the same whatever stands beside it (docs/decisions/0008-weights-of-sources.md).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from sft.config.load import display_path, resolve_path
from sft.config.schema import DataSection, ReplaySection
from sft.data import readers, rows, split
from sft.data.formats import Formats
from sft.data.ledger import Ledger, RowFault
from sft.data.readers import COMPRESSED, SUFFIXES, Progress, Raw, Section, Source, is_data_file, local, named
from sft.data.split import position
from sft.errors import DataError

DEFAULTS = ("data/raw/raw.jsonl", "data/raw/raw.json")


@dataclass
class Part:
    """One entry of the mix. rows, taken: counted while it is read, of them `taken` came through weight and limit."""

    name: str
    sources: list[Source]
    weight: float = 1.0
    limit: int | None = None
    rows: int = 0
    taken: int = 0

    def read(self, seed: int, on_progress: Progress | None) -> Iterator[Raw]:
        """The rows that weight and limit let through, in the order of the files."""
        self.rows = self.taken = 0
        rows = _chosen(self._all(on_progress), self.limit, seed)
        for raw in rows if self.weight == 1 else _weighted(rows, self.weight, seed):
            self.taken += 1
            yield raw

    def _all(self, on_progress: Progress | None) -> Iterator[Raw]:
        sizes = [source.path.stat().st_size if source.path else 0 for source in self.sources]
        for number, source in enumerate(self.sources):
            before = sum(sizes[:number])
            for raw in source.rows(_shifted(on_progress, before, sum(sizes)) if before else on_progress):
                self.rows += 1
                yield raw


@dataclass
class Mix:
    """Every part, in the order given. said: what a person should be told about the files."""

    parts: list[Part]
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for source in self._sources():
            self.said += source.found.said if source.found else []

    def _sources(self) -> list[Source]:
        return [source for part in self.parts for source in part.sources]

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    @property
    def kind(self) -> str:
        return ", ".join(dict.fromkeys(source.kind for source in self._sources()))

    @property
    def encoding(self) -> str:
        found = (source.found.encoding if source.found else "utf-8" for source in self._sources())
        return ", ".join(dict.fromkeys(found))

    def rows(self, seed: int, on_progress: Progress | None = None) -> Iterator[Raw]:
        """Every row of the mix, part after part; training shuffles them."""
        for part in self.parts:
            yield from part.read(seed, on_progress)

    def account(self) -> list[dict[str, Any]]:
        """For the ledger: what each part held and gave."""
        keys = ("name", "rows", "taken", "weight", "limit")
        return [{key: getattr(part, key) for key in keys} for part in self.parts]


def find(data: DataSection, root: Path, raw_path: str | None = None) -> Mix:
    """What to process. raw_path: from the command line, so it counts from the working folder and wins.

    Raises DataError: nothing there, not a data file, empty.
    """
    if raw_path:
        return _mix([_part(raw_path, Path(raw_path), root, data)])
    if data.raw_path:
        return _mix([_part(data.raw_path, resolve_path(root, data.raw_path), root, data)])
    if data.sources:
        made = [(_part(one.path, resolve_path(root, one.path), root, one), one) for one in data.sources]
        return _mix([replace(part, weight=one.weight, limit=one.limit) for part, one in made])
    for default in DEFAULTS:
        if (root / default).exists():
            return _mix([_part(default, root / default, root, data)])
    fix = f"put your rows there, or name the file: make process RAW=FILE; samples: {root / 'data/samples'}"
    raise DataError(f"no raw data: neither {DEFAULTS[0]} nor {DEFAULTS[1]} is there", where=str(root), fix=fix)


def _mix(parts: list[Part]) -> Mix:
    mix = Mix(parts)
    for part in parts:
        if len(part.sources) > 1:
            names = ", ".join(source.path.name for source in part.sources[:8] if source.path)
            mix.said.append(f"{part.name} is a folder of {len(part.sources)} files, all read as one: {names}")
    return mix


def _part(text: str, path: Path, root: Path, section: Section) -> Part:
    inside = expand(text, path, root, section)
    return Part(display_path(path, root) if path.is_dir() else inside[0].name, inside)


def expand(text: str, path: Path, root: Path, section: Section) -> list[Source]:
    """The file at `path`, all files of rows in the folder at `path`, or the hub data set `text`."""
    if not path.is_dir():
        return [named(text, path, root, section)]
    inside = sorted(found for found in path.rglob("*") if found.is_file() and _is_data(found, path))
    if not inside:
        fix = f"files of rows end in {', '.join(SUFFIXES)} (also {', '.join(COMPRESSED)}), see docs/DATA.md"
        raise DataError("the folder holds no file of rows", where=str(path), fix=fix)
    return [local(found, root) for found in inside]


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
    return is_data_file(path) and not hidden


def _shifted(on_progress: Progress | None, before: int, total: int) -> Progress | None:
    return (lambda done, _total: on_progress(before + done, total)) if on_progress else None


def _chosen(rows: Iterable[Raw], limit: int | None, seed: int) -> Iterable[Raw]:
    """The `limit` rows whose hashes come first, in their own order; never more than that many in memory."""
    if limit is None:
        return rows
    placed = ((place(raw, f"limit {seed}"), number, raw) for number, raw in enumerate(rows))
    first = heapq.nsmallest(limit, placed, key=itemgetter(0, 1))
    return [raw for _, _, raw in sorted(first, key=itemgetter(1))]


def _weighted(rows: Iterable[Raw], weight: float, seed: int) -> Iterator[Raw]:
    whole, part = divmod(weight, 1)
    for raw in rows:
        copies = int(whole) + (place(raw, f"weight {seed}") < part)
        if copies:
            yield raw._replace(copies=copies)


def place(raw: Raw, seed: str) -> float:
    """Where in [0, 1) this raw row lies, by a hash of its content."""
    try:
        content = readers.sorted_dumps(raw.value if raw.fault is None else raw.text)
    except (TypeError, ValueError):  # bytes, dates and half surrogates have no JSON
        content = repr(raw.value or raw.text).encode("utf-8", "backslashreplace")
    return position(hashlib.blake2b(content, digest_size=8).hexdigest(), seed)


Check = Callable[[rows.Row], None]


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
        fix = "give chat rows in any format of docs/DATA.md, or plain text as {text: ...}"
        raise DataError("data.replay.path holds no row that can be used", where=section.path, fix=fix)
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
) -> tuple[list[tuple[rows.Row, str]], int, int]:
    """The rows, how many were read, and how many of them could be used; never more than `wanted` in memory."""
    formats, seen, read = Formats("auto", None), set[str](), 0

    def usable() -> Iterator[tuple[rows.Row, str]]:
        nonlocal read
        for source in expand(section.path, resolve_path(root, section.path), root, section):
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


def _record(raw: Raw, formats: Formats) -> tuple[rows.Row, str]:
    """A chat row, or plain text as a rendered row whose input is empty: loss is taken on all of it."""
    try:
        return rows.record(raw, formats, None)
    except RowFault:
        text: Any = raw.value.get("text") if isinstance(raw.value, dict) else None
        if raw.fault is not None or not isinstance(text, str) or not text.strip():
            raise
        return rows.rendered_record("", text, origin=raw.origin), "plain text"
