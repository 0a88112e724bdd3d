"""All raw rows of a run: a file, a folder, a hub data set, or several of them with weights and limits; and replay.

A seeded hash of a row decides whether a weight below one or a limit takes it, so the choice is the same on every
machine and an appended row changes little. Weights count repetitions and not shares of the mix
(docs/decisions/0008-weights-of-sources.md).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.config.load import display_path, resolve_path
from sft.config.schema import DataSection, ReplaySection
from sft.data import rows
from sft.data.formats import TREE_MESSAGE, Formats, make_row, to_line, to_record
from sft.data.ledger import Ledger
from sft.data.readers import COMPRESSED, SPLITS, SUFFIXES, Progress, RawRow, Section, Source, is_data_file, open_source
from sft.data.rows import RowFault, dump_json
from sft.data.shards import URL, download
from sft.data.split import position
from sft.errors import DataError

DEFAULTS = ("data/raw/raw.jsonl", "data/raw/raw.json")


@dataclass
class SourcePart:
    """A file, folder or hub data set. rows: counted while it is read; of them `taken` passed weight and limit.

    messages: of OpenAssistant, which are joined to rows.
    """

    name: str
    sources: list[Source]
    weight: float = 1.0
    limit: int | None = None
    rows: int = 0
    taken: int = 0
    messages: int = 0

    @property
    def kind(self) -> str:
        """For the user: "JSON lines, CSV"."""
        return ", ".join(dict.fromkeys(source.kind for source in self.sources))

    @property
    def encoding(self) -> str:
        return ", ".join(dict.fromkeys(source.encoding for source in self.sources))

    def warnings(self) -> list[str]:
        """For the user, when all rows are read."""
        lines = [line for source in self.sources for line in source.warnings]
        if len(self.sources) > 1:
            names = ", ".join(source.path.name for source in self.sources[:8] if source.path)
            lines.append(f"{self.name} is a folder of {len(self.sources)} files, all read as one: {names}")
            if any(source.path and source.path.stem in SPLITS for source in self.sources):
                lines.append("rows of files named as splits are mixed, and split anew (data.split)")
        if self.messages:
            lines.append(
                f"{self.name} holds {self.messages:,} OpenAssistant messages, a row each: they are joined to trees, and"
                " of each tree the best-ranked path is trained on"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """For the ledger."""
        return {key: getattr(self, key) for key in ("name", "rows", "taken", "weight", "limit")}

    def read(self, seed: int, on_progress: Progress | None) -> Iterator[RawRow]:
        """The rows that weight and limit let pass, in the order of the files."""
        self.rows = self.taken = 0
        raws: Iterable[RawRow] = self.rows_of_all(on_progress)
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

    def rows_of_all(self, on_progress: Progress | None = None) -> Iterator[RawRow]:
        """The rows of every file of this part, in order; OpenAssistant's messages joined to trees."""
        for source in self.sources:
            for raw in self._trees(source.rows(on_progress)):
                self.rows += 1
                yield raw

    def _trees(self, raws: Iterator[RawRow]) -> Iterator[RawRow]:
        """OpenAssistant's messages, a row each, joined to a row a tree; other rows as they are."""
        messages: list[RawRow] = []
        for raw in raws:
            if isinstance(raw.value, dict) and raw.value.keys() >= TREE_MESSAGE:
                messages.append(raw)
            else:
                yield raw
        self.messages += len(messages)
        nodes = {str(raw.value["message_id"]): {**raw.value, "replies": []} for raw in messages}
        for node in nodes.values():
            if node["parent_id"] and (parent := nodes.get(str(node["parent_id"]))):
                parent["replies"].append(node)
        joined: set[str] = set()
        todo = [node for node in nodes.values() if not node["parent_id"]]
        while todo:
            node = todo.pop()
            joined.add(str(node["message_id"]))
            todo += node["replies"]
        for raw in messages:
            if not raw.value["parent_id"]:
                yield raw._replace(value={"prompt": nodes[str(raw.value["message_id"])]})
            elif str(raw.value["message_id"]) not in joined:  # a fault: a parent is missing, or parents form a circle
                yield raw


def find_sources(data: DataSection, root: Path, raw_path: str | None = None) -> list[SourcePart]:
    """What to process. raw_path: from the command line, so it counts from the working folder and wins."""
    if raw_path:
        return [open_part(raw_path, Path(raw_path), root, data)]
    if data.sources and not data.raw_path:
        parts = [open_part(entry.path, resolve_path(root, entry.path), root, entry) for entry in data.sources]
        return [replace(part, weight=e.weight, limit=e.limit) for part, e in zip(parts, data.sources, strict=True)]
    default = next((default for default in DEFAULTS if (root / default).exists()), None)
    if path := data.raw_path or default:
        return [open_part(path, resolve_path(root, path), root, data)]
    fix = f"put your rows there, or name the file: make process RAW=FILE; samples: {root / 'data/samples'}"
    raise DataError(f"no raw data: neither {DEFAULTS[0]} nor {DEFAULTS[1]} exists", where=str(root), fix=fix)


def open_part(text: str, path: Path, root: Path, section: Section) -> SourcePart:
    """The file at `path`, all files of rows in and below the folder at `path`, or the URL or hub data set `text`.

    Raises DataError: no such file, not rows, empty.
    """
    path = download(text, root) if URL.match(text) else path
    if not path.is_dir():
        source = open_source(path, root, text, section)
        return SourcePart(source.name, [source])
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and is_data_file(file)]
    files = [file for file in files if not any(name.startswith(".") for name in file.relative_to(path).parts)]
    if not files:
        fix = f"files of rows end in {', '.join(SUFFIXES)} (also {', '.join(COMPRESSED)}), see docs/DATA.md"
        raise DataError("the folder holds no file of rows", where=str(path), fix=fix)
    sources, problems = [], list[DataError]()
    for file in files:
        try:
            sources.append(open_source(file, root))
        except DataError as error:
            problems.append(error)
    if len(problems) > 1:
        lines = "".join(f"\n    {error.where}: {error.what}" for error in problems)
        what = f"{len(problems)} of the {len(files)} files cannot be read:{lines}"
        raise DataError(what, where=str(path), fix="move them out of the folder, or correct them")
    if problems:
        raise problems[0]
    return SourcePart(display_path(path, root), sources)


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
            out.write(to_line(row))
            ledger.read += 1
            ledger.replayed += 1
            ledger.count(format, rows.shape(row), "train")
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
    for raw in open_part(section.path, resolve_path(root, section.path), root, section).rows_of_all():
        counts["rows"] += 1
        text = raw.value.get("text") if isinstance(raw.value, dict) else None
        try:
            try:
                row, format = make_row(raw, formats, None)
            except RowFault:
                if not isinstance(text, str) or not text.strip():
                    raise
                row, format = to_record({"input": "", "target": text}, raw.origin), "plain text"
            check(row)
        except RowFault:
            continue
        if row["id"] not in seen:
            seen.add(row["id"])
            counts["usable"] += 1
            yield {**row, "replay": True}, format
