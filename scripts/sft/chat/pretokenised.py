"""Rows that come as tokens: columns `input_ids` and `labels` (or a mask) of Arrow or Parquet files.

Every row is checked once, part by part: ids are in the vocabulary, labels are -100 or the token itself. Arrow files
that need no change stay where they are, memory-mapped while training; the others are copied into the token cache.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from sft.chat.encode import Encoded, Encoder
from sft.chat.loss_mask import IGNORED, NO_LABEL, LabelledRow, fit_length
from sft.data import shards
from sft.errors import DataError

log = logging.getLogger("sft.chat")
_FIX = "write the files again from the rows"
MASKS = ("completion_mask", "assistant_masks", "loss_mask", "mask")  # 1 where a loss is taken: TRL's name, and others
_IDS, _WEIGHTS = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())


@dataclass(frozen=True)
class Part:
    """Up to shards.BATCH rows of a file, end to end, without padding. first: index of the first.

    weights: of the labels, None where each counts 1. copied: why they cannot be mapped as they are, None if they can.
    """

    file: Path
    first: int
    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int32]
    label_lengths: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    copied: str | None = None

    def name(self, row: int) -> str:
        """The id of one of its rows: the file and the place in it."""
        return f"{self.file.name}[{self.first + row}]"


@dataclass
class Scan:
    """What one pass over all rows yields. copied: why they must be copied, None if they can be mapped.

    labels: the column that has the labels. prompt_ids: of each row, a hash of the tokens before its first label (of all
    its tokens, if the first is labelled).
    """

    labels: str = "labels"
    copied: str | None = None
    weighted: bool = False
    rows: int = 0
    tokens: int = 0
    labelled: int = 0
    stops: bool = False
    prompt_ids: list[NDArray[np.uint64]] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)

    @property
    def mapped(self) -> dict[str, str]:
        """Column -> the column of the files that it is; nothing where all is copied."""
        weights = {"weights": "weights"} if self.weighted else {}
        return {} if self.copied else {"input_ids": "input_ids", "labels": self.labels, **weights}

    def ids(self) -> Iterator[str]:
        """The id of each row: its file and its place in it."""
        return (f"{name}[{index}]" for name, count in self.files for index in range(count))

    def sentence(self) -> str:
        """For the user: what happens to the files."""
        how = f"copied to the token cache, since {self.copied}" if self.copied else "used where they are, memory-mapped"
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {how}"


def scan(path: Path, encoder: Encoder, on_progress: Callable[[int, int], None] | None = None) -> Scan:
    """Checks every row. Raises DataError with the file and the row at the first that cannot be right."""
    result, total, ends = Scan(_labels_column(path, encoder)), shards.count(path), list(encoder.stops.ids)
    for part in parts(path, encoder):
        result.rows += len(part.lengths)
        result.tokens += len(part.ids)
        result.labelled += int((part.labels != IGNORED).sum())
        result.stops = result.stops or bool(np.isin(part.labels, ends).any())
        result.prompt_ids.append(_prompt_ids(part, encoder))
        if not result.files or result.files[-1][0] != part.file.name:
            result.files.append((part.file.name, 0))
        result.files[-1] = (part.file.name, result.files[-1][1] + len(part.lengths))
        result.copied = result.copied or part.copied or _unfit(part, encoder)
        result.weighted = part.weights is not None
        if on_progress:
            on_progress(result.rows, total)
    if result.rows and not result.stops:
        what = "no label of any row is an end token of this model, so it would not learn to end an answer"
        encoder.warn_once("tokens without an end", f"{path.name}: {what}")
    return result


def encoded(path: Path, encoder: Encoder) -> Iterator[Encoded]:
    """Every row as it is trained on: cut or dropped for its length as `model.over_length` says. Raises DataError."""
    limit, policy, bos = encoder.max_seq_len, encoder.over_length, getattr(encoder.tokenizer, "bos_token_id", None)
    for part in parts(path, encoder):
        ends, label_ends = np.cumsum(part.lengths), np.cumsum(part.label_lengths)
        for row, (end, label_end) in enumerate(zip(ends, label_ends, strict=True)):
            ids = part.ids[end - part.lengths[row] : end].tolist()
            labels = part.labels[label_end - part.label_lengths[row] : label_end].tolist()
            name = part.name(row)
            if not any(label != IGNORED for label in labels[encoder.kind == "causal" :]):
                yield Encoded(name, ids, labels, dropped=NO_LABEL)
            elif encoder.kind == "seq2seq":
                longer = LabelledRow(ids if len(ids) > len(labels) else labels)
                yield Encoded(name, ids, labels, dropped=fit_length(longer, limit, policy, name, bos)[1])
            else:
                weights = [] if part.weights is None else part.weights[end - part.lengths[row] : end].tolist()
                whole = LabelledRow(ids, labels, _runs(labels), weights)
                cut, dropped = fit_length(whole, limit, policy, name, bos)
                yield Encoded(name, cut.ids, cut.labels, len(ids) - len(cut.ids), dropped, weights=cut.weights or None)


def parts(path: Path, encoder: Encoder) -> Iterator[Part]:
    """All rows, checked."""
    label_column, vocabulary = _labels_column(path, encoder), len(encoder.tokenizer)
    types: dict[str, Any] = {}
    for file in shards.files_of(path):
        first, in_place = 0, shards.can_be_mapped(file)
        for batch in shards.batches(file):
            names = set(batch.schema.names)
            ids, lengths = _flat(batch, "input_ids", file, first)
            labels, label_lengths = _flat(batch, label_column, file, first)
            used = [name for name in ("input_ids", label_column, "weights") if name in names]
            of_file = {name: batch.schema.field(name).type for name in used}
            why = None if in_place else "Parquet and compressed files cannot be memory-mapped"
            if (types := types or of_file) != of_file:
                why = "the types of the files' columns differ"
            if label_column in MASKS:
                why = f"labels are made of the column {label_column}"
                _require_equal(lengths, label_lengths, file, first, label_column)
                labels = np.where(labels != 0, ids, IGNORED).astype(np.int32)
            weights = None
            if "weights" in names:
                weights, weight_lengths = _flat(batch, "weights", file, first, _WEIGHTS)
                _require_equal(label_lengths, weight_lengths, file, first, "weights")
            if "attention_mask" in names:
                mask, mask_lengths = _flat(batch, "attention_mask", file, first)
                _require_equal(lengths, mask_lengths, file, first, "attention_mask")
                if not (real := mask != 0).all():
                    why, real_lengths = "padding is removed", _real_lengths(lengths, real)
                    if encoder.kind == "causal":
                        _require_equal(lengths, label_lengths, file, first, label_column)
                        labels, label_lengths = labels[real], real_lengths
                        weights = None if weights is None else weights[real]
                    ids, lengths = ids[real], real_lengths
            if encoder.kind == "seq2seq" and not (real := labels != IGNORED).all():
                why, label_lengths = "padding is removed", _real_lengths(label_lengths, real)
                labels, weights = labels[real], None if weights is None else weights[real]
            part = Part(file, first, ids, lengths, labels, label_lengths, weights, why)
            _check(part, encoder, vocabulary)
            yield part
            first += batch.num_rows


def _real_lengths(lengths: NDArray[np.int64], real: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each row, how many of its places are real."""
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths)[real], minlength=len(lengths)).astype(np.int64)


def _labels_column(path: Path, encoder: Encoder) -> str:
    """The column that says where a loss is taken. Raises DataError if there is none."""
    names = shards.columns(shards.files_of(path)[0])
    for name in ("labels", *MASKS):
        if name in names:
            return name
    if encoder.in_loss == "all_tokens" and encoder.kind == "causal":
        return "input_ids"
    what = f"there are tokens, but no column says where a loss is taken (labels, or a mask: {', '.join(MASKS)})"
    fix = "add labels, -100 where no loss is taken; or --set train.labels=all_tokens for a loss on every token"
    raise DataError(what, where=str(path), fix=fix)


def _flat(batch: Any, name: str, file: Path, first: int, kind: Any = _IDS) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A column of lists end to end, and the length of each."""
    where = f"{file}[{first}]"
    own: Any = batch.schema.field(name).type if name in batch.schema.names else "missing"
    try:
        column = batch.column(name).cast(kind)
        if kind is _IDS and pyarrow.types.is_floating(own.value_type):
            raise TypeError
    except (KeyError, TypeError, AttributeError, pyarrow.ArrowException):
        what = "token ids" if kind is _IDS else "weights"
        raise DataError(f"the column {name} is {own}, not a list of {what}", where=where, fix=_FIX) from None
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DataError(f"the column {name} has an empty place (null)", where=where, fix=_FIX)
    return values.to_numpy(), np.diff(column.offsets.to_numpy()).astype(np.int64)


def _require_equal(lengths: Any, others: Any, file: Path, first: int, name: str) -> None:
    if (lengths != others).any():
        row = int((lengths != others).argmax())
        what = f"the row has {lengths[row]} tokens in input_ids and {others[row]} in {name}"
        raise DataError(what, where=f"{file}[{first + row}]", fix=_FIX)


def _check(part: Part, encoder: Encoder, vocabulary: int) -> None:
    """Raises DataError for ids outside the vocabulary, and for labels that are neither -100 nor the token."""
    in_vocabulary = f"the tokenizer has {vocabulary:,} tokens"
    if encoder.kind == "seq2seq":
        right, why = (part.labels >= 0) & (part.labels < vocabulary), in_vocabulary
    else:
        _require_equal(part.lengths, part.label_lengths, part.file, part.first, "labels")
        why = "it is neither -100 nor the token at its own place (labels are not shifted)"
        right = part.labels == part.ids
    _require(part, (part.ids >= 0) & (part.ids < vocabulary), "token", part.ids, part.lengths, in_vocabulary, encoder)
    _require(part, right | (part.labels == IGNORED), "label", part.labels, part.label_lengths, why, encoder)
    if part.weights is not None:
        valid, rule = np.isfinite(part.weights) & (part.weights >= 0), "it is negative or no number"
        _require(part, valid, "weight", part.weights, part.label_lengths, rule, encoder)


def _require(
    part: Part, right: Any, what: str, values: NDArray[Any], lengths: NDArray[np.int64], why: str, encoder: Encoder
) -> None:
    """Raises DataError with the row of the first value that is not right."""
    if not right.all():
        at = int((~right).argmax())
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        name = encoder.tokenizer.name_or_path
        raise DataError(
            f"the {what} {values[at]} cannot be right: {why}",
            where=f"{part.file}[{part.first + row}]",
            fix=f"tokenise the rows with the tokenizer of this model ({name}), or train on their texts",
        )


def _unfit(part: Part, encoder: Encoder) -> str | None:
    """Why some rows must be cut or dropped, None if all can be trained on as they are."""
    losses = part.labels != IGNORED
    starts = np.cumsum(part.label_lengths) - part.label_lengths
    if encoder.kind == "causal":
        losses[starts[part.label_lengths > 0]] = False
    before = np.concatenate([[0], np.cumsum(losses)])
    if (before[starts + part.label_lengths] == before[starts]).any():
        return "rows without a label are dropped"
    longest = max(part.lengths.max(initial=0), part.label_lengths.max(initial=0))
    return "rows over model.max_seq_len are cut or dropped" if longest > encoder.max_seq_len else None


def _prompt_ids(part: Part, encoder: Encoder) -> NDArray[np.uint64]:
    ends = np.cumsum(part.lengths)
    starts = ends - part.lengths
    stops = ends
    if encoder.kind == "causal":
        labelled = np.flatnonzero(part.labels != IGNORED)
        positions = np.append(labelled, len(part.ids))[np.searchsorted(labelled, starts)]
        stops = np.where((positions > starts) & (positions < ends), positions, ends)
    digests = (
        hashlib.blake2b(part.ids[a:b].tobytes(), digest_size=8).digest() for a, b in zip(starts, stops, strict=True)
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """[first, end) of each run of labels: the answers."""
    flags = np.concatenate([[0], np.array(labels) != IGNORED, [0]]).astype(np.int8)
    changes = np.flatnonzero(np.diff(flags))
    return [(int(a), int(b)) for a, b in changes.reshape(-1, 2)]
