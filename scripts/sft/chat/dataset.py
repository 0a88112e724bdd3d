"""All rows of a split, encoded, and the ledger of what came of each: rows read = rows trained on + rows named."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
from numpy.typing import NDArray

from sft import files
from sft.chat.encode import Encoded, Encoder, Row
from sft.chat.loss_mask import IGNORED
from sft.data import rows as records
from sft.data import store
from sft.errors import DataError, EnvironmentProblem

log = logging.getLogger("sft.chat")
Progress = Callable[[int, int], None]  # rows done, rows in all
BATCH = 256
_SEEN = 32  # rows whose text is decoded again, to see whether the tokenizer keeps it


@dataclass
class RunLedger:
    """rows_read = rows_trained + every row in `dropped` (reason -> ids).

    pieces: what is trained on, which is rows unless `split_turns` cuts some into several. pieces_dropped: reason ->
    number of pieces that could not be used of rows that are trained on all the same.
    """

    rows_read: int = 0
    rows_trained: int = 0
    pieces: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    rows_truncated: int = 0
    tokens_truncated: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    pieces_dropped: dict[str, int] = field(default_factory=dict)

    def add(self, *pieces: Encoded) -> None:
        """Counts one row: what it was encoded to, as a rule one piece."""
        self.rows_read += 1
        kept = [piece for piece in pieces if piece.dropped is None]
        lost = [piece.dropped for piece in pieces if piece.dropped is not None]
        if not kept:
            self.dropped.setdefault(lost[0], []).append(pieces[0].id)
            return
        for reason in lost:
            self.pieces_dropped[reason] = self.pieces_dropped.get(reason, 0) + 1
        self.rows_trained += 1
        self.pieces += len(kept)
        self.tokens += sum(len(piece.input_ids) for piece in kept)
        self.labelled_tokens += sum(label != IGNORED for piece in kept for label in piece.labels)
        self.rows_truncated += any(piece.truncated_tokens for piece in pieces)
        self.tokens_truncated += sum(piece.truncated_tokens for piece in pieces)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in outputs/<run>/ledger.json."""
        return {**vars(self), "reasons": {reason: len(ids) for reason, ids in self.dropped.items()}}

    def sentences(self) -> list[str]:
        """What a person must know: rows dropped, rows cut."""
        said = [f"{len(ids):,} rows dropped: {reason} (first: row {ids[0]})" for reason, ids in self.dropped.items()]
        if self.rows_truncated:
            said.append(f"{self.rows_truncated:,} rows cut to length, {self.tokens_truncated:,} tokens lost")
        if self.pieces > self.rows_trained:
            said.append(f"{self.rows_trained:,} rows split at their turns into {self.pieces:,} pieces")
        said += [f"{count:,} pieces of split rows dropped: {why}" for why, count in self.pieces_dropped.items()]
        return said

    def nothing_left(self, where: str) -> DataError:
        """The error for rows of which none can be trained on, with the reasons."""
        reasons = Counter({reason: len(ids) for reason, ids in self.dropped.items()}).most_common(5)
        told = "; ".join(f"{count:,} rows: {reason}" for reason, count in reasons) or "there are no rows"
        fix = "look at the rows: python scripts/preview.py --in data/processed/train.jsonl"
        return DataError(f"no row is left to train on: {told}", where=where, fix=fix)


def encoded(
    encoder: Encoder, rows: Iterable[Row], ledger: RunLedger, total: int, on_progress: Progress | None = None
) -> Iterator[tuple[Row, Encoded]]:
    """Each piece to train on with the row that it is of, in order, few at a time in memory; counts them in `ledger`."""
    waiting, looked = iter(rows), False
    while batch := list(islice(waiting, BATCH)):
        made = pieces(encoder, batch)
        for row in made:
            ledger.add(*row)
        kept = [(row, one) for row, all_of_it in zip(batch, made, strict=True) for one in all_of_it if not one.dropped]
        if not looked:
            looked = True
            _check_round_trip(encoder, [one for _, one in kept[:_SEEN]])
        yield from kept
        if on_progress:
            on_progress(min(ledger.rows_read, total), total)


def pieces(encoder: Encoder, rows: list[Row]) -> list[list[Encoded]]:
    """What each row is trained on as: itself, or under `over_length: split_turns` as many pieces as it needs."""
    made = encoder.encode_batch(rows)
    splits = encoder.over_length == "split_turns"
    return [
        encoder.encode_pieces(row) if splits and (one.truncated_tokens or one.dropped) else [one]
        for row, one in zip(rows, made, strict=True)
    ]


def _check_round_trip(encoder: Encoder, rows: list[Encoded]) -> None:
    """Says once when the tokenizer does not give a text back: accents lost, spaces merged, unknown characters."""
    if encoder.kind != "causal":
        return
    for row in rows:
        if row.truncated_tokens or not row.text:
            continue
        back = encoder.tokenizer.decode(row.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, again = ("".join(told.split()) for told in (row.text, str(back)))
        if text != again and not encoder.adds_end:
            log.warning(f"the tokenizer does not give text back as it was, e.g. in row {row.id}: see it with preview")
            return


Feature = dict[str, Any]
About = Callable[[Iterable[Row]], Any]
FOLDER = ".cache/tokenised"  # below the project root; `make clean` removes it
ENTRIES = 16  # the newest ones are kept
ROWS, ABOUT = "rows.arrow", "about.json"
TOGETHER = 1_024  # rows of one record batch
LOOKED_AT = 8  # rows encoded anew at each start, to see that the encoder still makes what is kept
CODE = ("chat/*.py", "data/*.py", "model/tokenizer.py")  # the files that decide ids and labels
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
TOKENS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema({"id": pyarrow.string(), "asks": pyarrow.uint64(), "input_ids": TOKENS, "labels": TOKENS})


class Tokenised(Sequence[Feature]):
    """Rows `{"id", "input_ids", "labels"}`, made into lists only when asked for. batches: of SCHEMA, e.g. mapped."""

    def __init__(self, batches: Sequence[Any] = ()) -> None:
        self._ids = [batch.column("id") for batch in batches]
        self._asks = [_values(batch.column("asks"), np.uint64) for batch in batches]
        self._lists = [{name: _list(batch.column(name)) for name in ("input_ids", "labels")} for batch in batches]
        self._ends = list(accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...
    def __getitem__(self, index: int | slice) -> Feature | list[Feature]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        batch = bisect_right(self._ends, index)
        at = index - (self._ends[batch - 1] if batch else 0)
        row: Feature = {"id": self._ids[batch][at].as_py()}
        for name, (offsets, values) in self._lists[batch].items():
            row[name] = values[offsets[at] : offsets[at + 1]].tolist()
        return row

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row's `input_ids`."""
        made = [np.diff(lists["input_ids"][0]) for lists in self._lists]
        return np.concatenate(made).astype(np.int64) if made else np.zeros(0, np.int64)

    def asks(self) -> NDArray[np.uint64]:
        """For each row the number of what it asks (`records.prompt_id`)."""
        return np.concatenate(self._asks) if self._asks else np.zeros(0, np.uint64)


def _values(column: Any, kind: Any) -> NDArray[Any]:
    """The numbers of a column as they lie in memory (of a list column: its offsets); pyarrow's own way loads pandas."""
    return np.frombuffer(column.buffers()[1], kind)[: len(column) + isinstance(column, pyarrow.ListArray)]


def _list(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where each row's numbers begin, and all numbers."""
    return _values(column, np.int32), _values(column.values, np.int32)


@dataclass(frozen=True)
class Split:
    """One file of rows, tokenised. about: what was asked of its rows. said: warnings that came up. kept: from before"""

    rows: Tokenised
    ledger: RunLedger
    about: Any
    said: list[str]
    kept: bool


class Tokeniser:
    """Encodes files of rows, and keeps what it makes in a folder (None: in memory alone).

    An entry is named by the SHA-256 of the file and `made_by`: the template, the tokenizer, the encoder's settings and
    code. It is one folder with a manifest, put in place at once.
    """

    def __init__(self, encoder: Encoder, cache: Path | None) -> None:
        self.encoder, self.cache = encoder, cache
        self.made_by = fingerprint(encoder) if cache is not None else ""

    def __call__(
        self, path: Path, digest: str, *, about: About = lambda _rows: None, on_progress: Progress | None = None
    ) -> Split:
        """The rows of `path` that can be trained on: those that are kept, where they are still right, else made anew.

        digest: SHA-256 of the file. about: a question about all its rows; the answer (of JSON) is kept with them.
        """
        if self.cache is None:
            return self._in_memory(path, about, on_progress)
        entry = self.cache / hashlib.sha256(f"{digest} {self.made_by}".encode()).hexdigest()[:32]
        if entry.exists():
            found = _opened(entry, self.encoder, path)
            if isinstance(found, Split):
                return found
            log.warning("the tokenised rows kept in %s cannot be used (%s): they are made anew", entry, found)
        try:
            with files.atomic_folder(entry) as staged:
                with pyarrow.OSFile(str(staged / ROWS), "wb") as sink:
                    told = _make(self.encoder, path, sink, about, on_progress)
                files.write_json(staged / ABOUT, told)
                files.write_manifest(staged)
            _forget(self.cache)
            return _split(pyarrow.memory_map(str(entry / ROWS)), told, kept=False)
        except (OSError, EnvironmentProblem) as error:
            log.warning("tokenised rows cannot be kept in %s (%s): they stay in memory", self.cache, error)
            return self._in_memory(path, about, on_progress)

    def _in_memory(self, path: Path, about: About, on_progress: Progress | None) -> Split:
        sink = pyarrow.BufferOutputStream()
        told = _make(self.encoder, path, sink, about, on_progress)
        return _split(pyarrow.BufferReader(sink.getvalue()), told, kept=False)


def _make(encoder: Encoder, path: Path, sink: Any, about: About, on_progress: Progress | None) -> dict[str, Any]:
    """Writes the rows to `sink` as they are encoded; returns what else is known of them, of JSON."""
    ledger = RunLedger()
    with path.open("rb") as lines:
        total = sum(1 for _ in lines)
    with _heard() as said, pyarrow.ipc.new_file(sink, SCHEMA) as out:
        made = encoded(encoder, store.iter_rows(path), ledger, total, on_progress)
        while part := list(islice(made, TOGETHER)):
            columns = {
                "id": [one.id for _, one in part],
                "asks": [int(records.prompt_id(row), 16) for row, _ in part],
                "input_ids": [one.input_ids for _, one in part],
                "labels": [one.labels for _, one in part],
            }
            out.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=SCHEMA))
    return {"ledger": vars(ledger), "about": about(store.iter_rows(path)), "said": said}


def _opened(entry: Path, encoder: Encoder, path: Path) -> Split | str:
    """What is kept in `entry`, or why it cannot be used. Warnings of the time when it was made are given again."""
    if problem := files.manifest_problem(entry):
        return problem
    try:
        told = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
        found = _split(pyarrow.memory_map(str(entry / ROWS)), told, kept=True)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        return f"they cannot be read: {type(error).__name__}"
    with _heard() as again:
        first = pieces(encoder, list(islice(store.iter_rows(path), LOOKED_AT)))
    wanted = [{"id": one.id, "input_ids": one.input_ids, "labels": one.labels}
              for made in first for one in made if one.dropped is None]  # fmt: skip
    if found.rows[: len(wanted)] != wanted:
        return "the encoder makes other tokens of the same rows now"
    for text in found.said:
        if text not in again:
            log.warning("%s", text)
    entry.touch()
    return found


def _split(source: Any, told: dict[str, Any], *, kept: bool) -> Split:
    file = pyarrow.ipc.open_file(source)
    if file.schema != SCHEMA:
        raise ValueError("other columns")
    rows = Tokenised([file.get_batch(number) for number in range(file.num_record_batches)])
    return Split(rows, RunLedger(**told["ledger"]), told["about"], list(told["said"]), kept)


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 over all that decides what an encoder makes of a row."""
    template, tokenizer = encoder.template, encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    told = [template.digest, _plain(template), encoder.kind, _plain(encoder), type(tokenizer).__name__, _code()]
    return hashlib.sha256(f"{told!r} {words}".encode()).hexdigest()


def _plain(thing: Any) -> list[tuple[str, Any]]:
    """The settings of an object: its attributes that are plain values, but `warned`, which is no setting."""
    kinds = (str, int, float, type(None))
    return sorted((name, value) for name, value in vars(thing).items() if isinstance(value, kinds) and name != "warned")


def _code() -> list[str]:
    """The version of the code that makes ids and labels: hashes of our files, versions of the libraries."""
    room = Path(__file__).resolve().parents[1]
    ours = [files.sha256(path) for pattern in CODE for path in sorted(room.glob(pattern))]
    return [*ours, *(metadata.version(name) for name in LIBRARIES)]


def _forget(cache: Path) -> None:
    """Removes the entries that were not used for longest, and what killed starts left behind."""
    files.sweep(cache)
    entries = [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[ENTRIES:]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects the warnings of this room that are logged meanwhile."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield texts
    finally:
        log.removeHandler(handler)
