"""All rows of a split, encoded and cached, and the ledger: rows read = rows trained on + rows named with the reason."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from sft import files
from sft.chat import pretokenised
from sft.chat.encode import Encoded, Encoder, Row
from sft.chat.loss_mask import IGNORED
from sft.data import rows as records
from sft.data import shards, store
from sft.errors import DataError, EnvironmentProblem

log = logging.getLogger("sft.chat")
Feature = dict[str, Any]
Progress = Callable[[int, int], None]  # rows done, rows in all
BATCH = 256  # rows tokenised together
FOLDER = ".cache/tokenised"  # below the project root; `make clean` removes it
MAX_ENTRIES = 16  # of the cache; the least recently used go
ROWS, ABOUT = "rows.arrow", "about.json"
CODE = ("chat/*.py", "data/*.py", "model/tokenizer.py")  # the files that decide ids and labels
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_IDS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "prompt_id": pyarrow.uint64(),
        "chosen": pyarrow.int32(),  # of a preference pair, how many of its tokens are the chosen side's; else 0
        "input_ids": _IDS,
        "rating": pyarrow.int8(),  # of a rated answer, 1 or -1; else 0
        "labels": _IDS,
        "weights": pyarrow.list_(pyarrow.float32()),  # of the labels; null where each is 1
    }
)


@dataclass
class RunLedger:
    """rows_read = rows_trained + every row in `dropped` (reason -> ids).

    pieces: what is trained on, which is rows unless `split_turns` cuts some into several, or each answer of a pair is
    rated (pairs_rated). pieces_dropped: reason -> number of unusable pieces of rows that are trained on nevertheless.
    """

    rows_read: int = 0
    rows_trained: int = 0
    pieces: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    rows_weighted: int = 0
    pairs_rated: int = 0
    rows_truncated: int = 0
    tokens_truncated: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    pieces_dropped: dict[str, int] = field(default_factory=dict)

    def add(self, *pieces: Encoded) -> None:
        """Counts one row: what it was encoded to, usually one piece."""
        self.rows_read += 1
        usable = [piece for piece in pieces if piece.dropped is None]
        reasons = [piece.dropped for piece in pieces if piece.dropped is not None]
        if not usable:
            self.dropped.setdefault(reasons[0], []).append(pieces[0].id)
            return
        for reason in reasons:
            self.pieces_dropped[reason] = self.pieces_dropped.get(reason, 0) + 1
        self.rows_trained += 1
        self.rows_weighted += usable[0].row_weight is not None
        self.pairs_rated += len(pieces) > 1 and pieces[0].rating != 0
        self.pieces += len(usable)
        self.tokens += sum(len(piece.input_ids) for piece in usable)
        self.labelled_tokens += sum(label != IGNORED for piece in usable for label in piece.labels)
        self.rows_truncated += any(piece.truncated_tokens for piece in pieces)
        self.tokens_truncated += sum(piece.truncated_tokens for piece in pieces)

    def to_dict(self) -> dict[str, Any]:
        """As in outputs/<run>/ledger.json."""
        return {**vars(self), "reasons": {reason: len(ids) for reason, ids in self.dropped.items()}}

    def sentences(self) -> list[str]:
        """What a person must know: rows dropped, cut or split."""
        lines = [f"{len(ids):,} rows dropped: {reason} (first: row {ids[0]})" for reason, ids in self.dropped.items()]
        if self.rows_truncated:
            lines.append(f"{self.rows_truncated:,} rows cut to length, {self.tokens_truncated:,} tokens lost")
        if self.rows_weighted and (rest := self.rows_trained - self.rows_weighted):
            lines.append(f"{rest:,} rows have no weight of their own (data.weight_field): each counts 1")
        if self.pairs_rated:
            lines.append(
                f"{self.pairs_rated:,} pairs: each answer counts as a row that is rated, {self.pieces:,} in all"
            )
        elif self.pieces > self.rows_trained:
            lines.append(f"{self.rows_trained:,} rows split at their turns into {self.pieces:,} pieces")
        what = "answers of these pairs" if self.pairs_rated else "pieces of split rows"
        return lines + [f"{count:,} {what} dropped: {why}" for why, count in self.pieces_dropped.items()]

    def no_rows_left(self, where: str) -> DataError:
        """The error for rows of which none can be trained on, with the reasons."""
        counts = Counter({reason: len(ids) for reason, ids in self.dropped.items()}).most_common(5)
        reasons = "; ".join(f"{count:,} rows: {reason}" for reason, count in counts) or "there are no rows"
        fix = "look at the rows: python scripts/preview.py --in data/processed/train.jsonl"
        return DataError(f"no row is left to train on: {reasons}", where=where, fix=fix)


def encode_rows(
    encoder: Encoder, rows: Iterable[Row], ledger: RunLedger, total: int, on_progress: Progress | None = None
) -> Iterator[tuple[Row, Encoded]]:
    """Each piece to train on with its row, in order, few at a time in memory; counts them in `ledger`."""
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH)):
        for row, pieces in zip(batch, encoder.encode_pieces(batch), strict=True):
            ledger.add(*pieces)
            yield from ((row, piece) for piece in pieces if piece.dropped is None)
        if on_progress:
            on_progress(min(ledger.rows_read, total), total)


class TokenisedRows(Sequence[Feature]):
    """Rows `{"id", "input_ids", "labels", "weights"?, "chosen"?}` of an Arrow table (SCHEMA); lists on access.

    release: gives back the memory that reading a mapped table has filled.
    """

    def __init__(self, table: pyarrow.Table | None = None, release: Callable[[], None] | None = None) -> None:
        self._table = SCHEMA.empty_table() if table is None else table
        self._release = release or (lambda: None)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        ids = {name: self._table.column(name)[index].values.to_numpy().tolist() for name in ("input_ids", "labels")}
        more = {name: self._table.column(name)[index].as_py() for name in ("weights", "chosen", "rating")}
        more = {name: value for name, value in more.items() if value}
        return {"id": self._table.column("id")[index].as_py(), **ids, **more}

    def joined(self, others: Sequence[Feature]) -> TokenisedRows:
        """These rows and, behind them, others, whose `prompt_id` is 0."""
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in others] for name in SCHEMA.names}
        columns["prompt_id"] = columns["chosen"] = columns["rating"] = [0] * len(columns["id"])
        more = pyarrow.table(columns, schema=SCHEMA).select(self._table.column_names).cast(self._table.schema)
        return TokenisedRows(pyarrow.concat_tables([self._table, more]), self._release)

    def longest(self) -> int:
        """Tokens of the longest row, or side of a pair."""
        lengths, chosen = self.lengths(), self._table.column("chosen").to_numpy()
        return int(np.maximum(chosen, lengths - chosen).max())

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row's `input_ids`, of a pair those of both sides."""
        return np.asarray(pyarrow.compute.list_value_length(self._table.column("input_ids")).to_numpy(), np.int64)

    def labels(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """The labels of some rows end to end and how many each of them has, part by part through all rows."""
        for chunk in self._table.column("labels").chunks:
            yield chunk.flatten().to_numpy(), pyarrow.compute.list_value_length(chunk).to_numpy().astype(np.int64)
            self._release()

    def prompt_ids(self) -> NDArray[np.uint64]:
        """For each row the hash of what it asks (`records.prompt_id`)."""
        return np.asarray(self._table.column("prompt_id").to_numpy(), np.uint64)


@dataclass(frozen=True)
class Split:
    """One file of rows, tokenised. system: the system text that all rows share."""

    rows: TokenisedRows
    ledger: RunLedger
    system: str | None
    cached: bool = False


class Tokeniser:
    """Encodes files of rows and caches the result in a folder (None: only in memory): a folder with a manifest, named
    by the SHA-256 of the file and the encoder's fingerprint. Of rows that come as tokens and can be used where they
    are, only ids are cached.
    """

    def __init__(self, encoder: Encoder, cache: Path | None) -> None:
        self.encoder, self.cache = encoder, cache
        self.fingerprint = fingerprint(encoder) if cache is not None else ""

    def __call__(self, path: Path, digest: str, on_progress: Progress | None = None) -> Split:
        """The rows of `path` (`digest`: its SHA-256) that can be trained on, from the cache or encoded."""
        if self.cache is not None:
            entry = self.cache / hashlib.sha256(f"{digest} {self.fingerprint}".encode()).hexdigest()[:32]
            try:
                if entry.exists() and (split := self._read(entry, path)):
                    return split
                with files.atomic_folder(entry) as staged:
                    with pyarrow.OSFile(str(staged / ROWS), "wb") as sink:
                        about = self._write(path, sink, on_progress)
                    files.write_json(staged / ABOUT, about)
                    files.write_manifest(staged)
                _remove_old_entries(self.cache)
                return _split(*shards.mapped([entry / ROWS]), about, path)
            except (OSError, EnvironmentProblem) as error:
                log.warning("tokens cannot be cached in %s (%s): they stay in memory", self.cache, error)
        buffer = pyarrow.BufferOutputStream()
        about = self._write(path, buffer, on_progress)
        return _split(pyarrow.ipc.open_file(buffer.getvalue()).read_all(), None, about, path)

    def _write(self, path: Path, sink: Any, on_progress: Progress | None) -> dict[str, Any]:
        """Writes the rows to `sink` as they are encoded; returns ledger, system text and warnings as JSON values."""
        ledger, earlier, system, mapped = RunLedger(), set(self.encoder.warnings), None, {}
        if shards.has_tokens(path):
            if self.encoder.pairs or self.encoder.rated:
                what = "train.objective compares two answers, and rows of tokens have one"
                fix = "train on pairs of `chosen` and `rejected`, or --set train.objective=response"
                raise DataError(what, where=str(path), fix=fix)
            scan = pretokenised.scan(path, self.encoder, on_progress)
            log.info("%s: %s", path.name, scan.sentence())
            pieces, mapped = self._tokens(path, scan, ledger), scan.mapped
        else:
            rows = encode_rows(self.encoder, store.iter_rows(path), ledger, shards.count(path), on_progress)
            pieces = ((int(records.prompt_id(row), 16), piece) for row, piece in rows)
            system = records.shared_system_text(store.iter_rows(path))
        schema = pyarrow.schema([field for field in SCHEMA if field.name not in mapped])
        with pyarrow.ipc.new_file(sink, schema) as out:
            while part := list(islice(pieces, 4 * BATCH)):
                columns = {name: [getattr(piece, name, None) for _, piece in part] for name in schema.names}
                columns["prompt_id"] = [prompt_id for prompt_id, _ in part]
                out.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema))
        warnings = {kind: text for kind, text in self.encoder.warnings.items() if kind not in earlier}
        return {"ledger": vars(ledger), "system": system, "warnings": warnings, "mapped": mapped}

    def _tokens(self, path: Path, scan: pretokenised.Scan, ledger: RunLedger) -> Iterator[tuple[int, Encoded]]:
        """The rows of `path`, which come as tokens; without the tokens where they are mapped."""
        prompt_ids = (int(one) for part in scan.prompt_ids for one in part)
        if scan.mapped:
            ledger.rows_read = ledger.rows_trained = ledger.pieces = scan.rows
            ledger.tokens, ledger.labelled_tokens = scan.tokens, scan.labelled
            for prompt_id, name in zip(prompt_ids, scan.ids(), strict=True):
                yield prompt_id, Encoded(name, [], [])
            return
        for prompt_id, piece in zip(prompt_ids, pretokenised.encoded(path, self.encoder), strict=True):
            ledger.add(piece)
            if piece.dropped is None:
                yield prompt_id, piece

    def _read(self, entry: Path, path: Path) -> Split | None:
        """What is cached in `entry`, with the warnings of when it was written; None, with a warning, if damaged."""
        problem = files.manifest_problem(entry)
        try:
            if not problem:
                about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
                split = _split(*shards.mapped([entry / ROWS]), about, path, cached=True)
                for kind, text in about["warnings"].items():
                    self.encoder.warn_once(kind, text)
                entry.touch()
                return split
        except (OSError, pyarrow.ArrowException) as error:
            problem = f"they cannot be read: {type(error).__name__}"
        log.warning("the cached tokens in %s cannot be used (%s): rows are encoded again", entry, problem)
        return None


def _split(
    table: pyarrow.Table, release: Callable[[], None] | None, about: dict[str, Any], path: Path, *, cached: bool = False
) -> Split:
    """mapped: of rows that come as tokens, column -> the column of the files at `path` that it is."""
    if mapped := about["mapped"]:
        columns, release = shards.mapped(shards.files_of(path), list(dict.fromkeys(mapped.values())))
        for name, source in mapped.items():
            table = table.append_column(name, columns.column(source))
    return Split(TokenisedRows(table, release), RunLedger(**about["ledger"]), about["system"], cached)


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 over all that decides what an encoder makes of a row: template, tokenizer, settings, code, libraries."""
    template, tokenizer = encoder.template, encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    package = Path(__file__).resolve().parents[1]
    code = [files.sha256(path) for pattern in CODE for path in sorted(package.glob(pattern))]
    parts = (
        template.digest,
        (template.name, template.origin, template.control_text, template.parts),
        (encoder.kind, encoder.max_seq_len, encoder.over_length, encoder.in_loss, encoder.weight_field),
        (encoder.pairs, encoder.rated),
        type(tokenizer).__name__,
        (*code, *(metadata.version(name) for name in LIBRARIES)),
    )
    return hashlib.sha256(f"{parts!r} {vocabulary}".encode()).hexdigest()


def _remove_old_entries(cache: Path) -> None:
    """Removes the least recently used entries, and what killed commands left behind."""
    files.sweep(cache)
    entries = [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[MAX_ENTRIES:]:
        shutil.rmtree(path, ignore_errors=True)
