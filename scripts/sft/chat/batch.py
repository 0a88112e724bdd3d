"""All rows of a split, encoded, and the ledger of what came of each: rows read = rows trained on + rows named."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sft.chat.encode import Encoded, Encoder, Row
from sft.chat.length import IGNORED
from sft.errors import DataError

log = logging.getLogger("sft.chat")
BATCH = 256
_SEEN = 32  # rows whose text is decoded again, to see whether the tokenizer keeps it


@dataclass
class RunLedger:
    """rows_read = rows_trained + every row in `dropped` (reason -> ids)."""

    rows_read: int = 0
    rows_trained: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    rows_truncated: int = 0
    tokens_truncated: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, row: Encoded) -> None:
        self.rows_read += 1
        if row.dropped:
            self.dropped.setdefault(row.dropped, []).append(row.id)
            return
        self.rows_trained += 1
        self.tokens += len(row.input_ids)
        self.labelled_tokens += sum(1 for label in row.labels if label != IGNORED)
        self.rows_truncated += row.truncated_tokens > 0
        self.tokens_truncated += row.truncated_tokens

    def to_dict(self) -> dict[str, Any]:
        """As it stands in outputs/<run>/ledger.json."""
        return {**vars(self), "reasons": {reason: len(ids) for reason, ids in self.dropped.items()}}

    def sentences(self) -> list[str]:
        """What a person must know: rows dropped, rows cut."""
        said = [f"{len(ids):,} rows dropped: {reason} (first: row {ids[0]})" for reason, ids in self.dropped.items()]
        if self.rows_truncated:
            said.append(f"{self.rows_truncated:,} rows cut to length, {self.tokens_truncated:,} tokens lost")
        return said


def encode_all(
    encoder: Encoder, rows: list[Row], on_progress: Callable[[int, int], None] | None = None
) -> tuple[list[Encoded], RunLedger]:
    """The rows that can be trained on, in order, and the ledger. on_progress(done, total) is called now and then.

    Raises DataError where no row is left, with the reasons.
    """
    kept: list[Encoded] = []
    ledger = RunLedger()
    for at in range(0, len(rows), BATCH):
        for made in encoder.encode_batch(rows[at : at + BATCH]):
            ledger.add(made)
            if made.dropped is None:
                kept.append(made)
        if at == 0:
            _check_round_trip(encoder, kept[:_SEEN])
        if on_progress:
            on_progress(min(at + BATCH, len(rows)), len(rows))
    if not kept:
        reasons = Counter({reason: len(ids) for reason, ids in ledger.dropped.items()}).most_common(5)
        told = "; ".join(f"{count:,} rows: {reason}" for reason, count in reasons) or "there are no rows"
        raise DataError(
            f"no row is left to train on: {told}",
            where=encoder.template.name,
            mend="look at the rows: python scripts/preview.py --in data/processed/train.jsonl",
        )
    return kept, ledger


def _check_round_trip(encoder: Encoder, rows: list[Encoded]) -> None:
    """Says once when the tokenizer does not give a text back: accents lost, spaces merged, unknown characters."""
    if encoder.kind != "causal":
        return
    for row in rows:
        if row.truncated_tokens or not row.text:
            continue
        back = encoder.tokenizer.decode(row.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _squeezed(str(back)) != _squeezed(row.text) and not encoder.adds_end:
            log.warning(f"the tokenizer does not give text back as it was, e.g. in row {row.id}: see it with preview")
            return


def _squeezed(text: str) -> str:
    return "".join(text.split())
