"""All raw rows of a run: a file, a folder, a hub data set, or several of them with weights and limits; and replay.

A seeded hash of a row decides whether a weight below one or a limit takes it, so the choice is the same on every
machine and an appended row changes little. Weights count repetitions and not shares of the mix
(docs/decisions/0008-weights-of-sources.md).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.config.load import display_path, resolve_path
from sft.config.schema import DataSection, ReplaySection
from sft.data import rows
from sft.data.formats import Formats
from sft.data.ledger import Ledger, RowFault
from sft.data.readers import (
    COMPRESSED,
    SUFFIXES,
    Progress,
    RawRow,
    Section,
    Source,
    dump_json,
    is_data_file,
    open_file,
    open_source,
)  # fmt: skip
from sft.data.split import position
from sft.errors import DataError

DEFAULTS = ("data/raw/raw.jsonl", "data/raw/raw.json")


@dataclass
class SourcePart:
    """One entry of data.sources. rows: counted while it is read; of them `taken` passed weight and limit."""

    name: str
    sources: list[Source]
    weight: float = 1.0
    limit: int | None = None
    rows: int = 0
    taken: int = 0

    def read(self, seed: int, on_progress: Progress | None) -> Iterator[RawRow]:
        """The rows that weight and limit let pass, in the order of the files."""
        self.rows = self.taken = 0
        raws: Iterable[RawRow] = self._all(on_progress)
        if self.limit is not None:  # the rows with the first hashes; never more than that many in memory
            placed = ((_position(raw, f"limit {seed}"), number, raw) for number, raw in enumerate(raws))
            first = heapq.nsmallest(self.limit, placed, key=lambda item: item[:2])
            raws = [raw for _, _, raw in sorted(first, key=lambda item: item[1])]
        whole, fraction = divmod(self.weight, 1)
        for raw in raws:
            copies = int(whole) + (fraction > 0 and _position(raw, f"weight {seed}") < fraction)
            if copies:
                self.taken += 1
                yield raw if copies == 1 else raw._replace(copies=copies)

    def _all(self, on_progress: Progress | None) -> Iterator[RawRow]:
        sizes = [source.path.stat().st_size if source.path else 0 for source in self.sources]
        for number, source in enumerate(self.sources):
            before = sum(sizes[:number])

            def shifted(done: int, total: int, before: int = before) -> None:
                if on_progress:
                    on_progress(before + done, sum(sizes) or total)

            for raw in source.rows(shifted):
                self.rows += 1
                yield raw


@dataclass
class SourceMix:
    """Every part, in order. warnings: about the files, for the user."""

    parts: list[SourcePart]
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part in self.parts:
            for source in part.sources:
                self.warnings += source.type.warnings if source.type else ()
            if len(part.sources) > 1:
                names = ", ".join(source.path.name for source in part.sources[:8] if source.path)
                self.warnings.append(f"{part.name} is a folder of {len(part.sources)} files, all read as one: {names}")

    def ledger(self, max_dropped: float) -> Ledger:
        """An empty account of these sources."""
        types = [source.type for part in self.parts for source in part.sources]
        encodings = dict.fromkeys(file_type.encoding if file_type else "utf-8" for file_type in types)
        return Ledger(self.name, self.kind, ", ".join(encodings), max_dropped=max_dropped, warnings=list(self.warnings))

    @property
    def kind(self) -> str:
        return ", ".join(dict.fromkeys(source.kind for part in self.parts for source in part.sources))

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    def rows(self, seed: int, on_progress: Progress | None = None) -> Iterator[RawRow]:
        """Every row, part after part; training shuffles them."""
        for part in self.parts:
            yield from part.read(seed, on_progress)

    def account(self) -> list[dict[str, Any]]:
        """For the ledger: how many rows each part had and gave."""
        keys = ("name", "rows", "taken", "weight", "limit")
        return [{key: getattr(part, key) for key in keys} for part in self.parts]


def find_sources(data: DataSection, root: Path, raw_path: str | None = None) -> SourceMix:
    """What to process. raw_path: from the command line, so it counts from the working folder and wins.

    Raises DataError: nothing there, not rows, empty.
    """
    if raw_path:
        return SourceMix([_part(raw_path, Path(raw_path), root, data)])
    if data.raw_path:
        return SourceMix([_part(data.raw_path, resolve_path(root, data.raw_path), root, data)])
    if data.sources:
        parts = [_part(entry.path, resolve_path(root, entry.path), root, entry) for entry in data.sources]
        for part, entry in zip(parts, data.sources, strict=True):
            part.weight, part.limit = entry.weight, entry.limit
        return SourceMix(parts)
    for default in DEFAULTS:
        if (root / default).exists():
            return SourceMix([_part(default, root / default, root, data)])
    fix = f"put your rows there, or name the file: make process RAW=FILE; samples: {root / 'data/samples'}"
    raise DataError(f"no raw data: neither {DEFAULTS[0]} nor {DEFAULTS[1]} exists", where=str(root), fix=fix)


def _part(text: str, path: Path, root: Path, section: Section) -> SourcePart:
    sources = expand_path(text, path, root, section)
    return SourcePart(display_path(path, root) if path.is_dir() else sources[0].name, sources)


def expand_path(text: str, path: Path, root: Path, section: Section) -> list[Source]:
    """The file at `path`, all files of rows in and below the folder at `path`, or the hub data set `text`."""
    if not path.is_dir():
        return [open_source(text, path, root, section)]
    inside = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and is_data_file(file)
        and not any(name.startswith(".") for name in file.relative_to(path).parts)
    )
    if not inside:
        fix = f"files of rows end in {', '.join(SUFFIXES)} (also {', '.join(COMPRESSED)}), see docs/DATA.md"
        raise DataError("the folder holds no file of rows", where=str(path), fix=fix)
    return [open_file(file, root) for file in inside]


def _position(raw: RawRow, seed: str) -> float:
    """The position in [0, 1) of a raw row, by a hash of its content."""
    try:
        content = dump_json(raw.value if raw.fault is None else raw.text, sort_keys=True)
    except (TypeError, ValueError):  # bytes, dates and half surrogates have no JSON
        content = repr(raw.value or raw.text).encode("utf-8", "backslashreplace")
    return position(hashlib.blake2b(content, digest_size=8).hexdigest(), seed)


def add_replay(data: DataSection, root: Path, staged: Path, ledger: Ledger, check: Callable[[rows.Row], None]) -> None:
    """Adds general rows to the staged training file until they are `data.replay.ratio` of it, chosen by a seeded hash.

    They count as read and written. check: raises RowFault for a row that may not be trained on. Raises DataError for
    a file without a usable row.
    """
    section, train = data.replay, ledger.splits.get("train", 0)
    if section is None or not train:
        return
    target = max(1, round(train * section.ratio / (1 - section.ratio)))
    counts = {"rows": 0, "usable": 0}
    usable, seed = _replay_rows(section, root, counts, check), f"replay {data.split.seed}"
    chosen = heapq.nsmallest(target, usable, key=lambda item: position(item[0]["id"], seed))
    if not chosen:
        fix = "give chat rows in any format of docs/DATA.md, or plain text as {text: ...}"
        raise DataError("data.replay.path holds no usable row", where=section.path, fix=fix)
    with (staged / "train.jsonl").open("ab") as out:
        for row, format in chosen:
            out.write(rows.to_line(row))
            ledger.read += 1
            ledger.replayed += 1
            ledger.count(row, format, "train")
    share = len(chosen) / ledger.splits["train"]
    report = {"path": section.path, "ratio": section.ratio, **counts, "taken": len(chosen)}
    ledger.reports["replay"] = {**report, "share": round(share, 6)}
    if len(chosen) < target:
        missing = f"has {counts['usable']:,} usable rows, fewer than the {target:,} of data.replay.ratio"
        ledger.warnings.append(f"replay: {section.path} {missing}: {share:.1%} of the mix")


def _replay_rows(
    section: ReplaySection, root: Path, counts: dict[str, int], check: Callable[[rows.Row], None]
) -> Iterator[tuple[rows.Row, str]]:
    """Usable rows with their format: chat rows, or plain text with an empty input, where all of it is in the loss."""
    formats, seen = Formats("auto", None), set[str]()
    for source in expand_path(section.path, resolve_path(root, section.path), root, section):
        for raw in source.rows():
            counts["rows"] += 1
            text = raw.value.get("text") if isinstance(raw.value, dict) else None
            try:
                try:
                    row, format = rows.make_row(raw, formats, None)
                except RowFault:
                    if not isinstance(text, str) or not text.strip():
                        raise
                    row, format = rows.rendered_record("", text, origin=raw.origin), "plain text"
                check(row)
            except RowFault:
                continue
            if row["id"] not in seen:
                seen.add(row["id"])
                counts["usable"] += 1
                yield {**row, "replay": True}, format
