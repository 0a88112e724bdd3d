"""All rows of a split, encoded, and the ledger of what came of each: rows read = rows trained on + rows named."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sft.chat.encode import Encoded, Encoder, Row
from sft.chat.length import IGNORED
from sft.errors import DataError

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
        mend = "look at the rows: python scripts/preview.py --in data/processed/train.jsonl"
        return DataError(f"no row is left to train on: {told}", where=where, mend=mend)


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
