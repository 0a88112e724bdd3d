"""The rows of a run: read, rendered, tokenised and labelled, with every one that is not trained on named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft import files
from sft.chat.batch import RunLedger, encode_all
from sft.chat.encode import Encoded, Encoder
from sft.data import records, store
from sft.errors import DataError
from sft.generation import system_text
from sft.generation.evaluation import Question
from sft.training.windows import Feature

log = logging.getLogger("sft.training")
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Features `{"id", "input_ids", "labels"}` to train and evaluate on; where they came from; every row's fate."""

    stage: str
    train: list[Feature]
    validation: list[Feature]
    questions: list[Question]
    hashes: dict[str, str]  # SHA-256 of each file that was read
    ledgers: dict[str, RunLedger]
    system: str | None = None  # the system text that every training row shares

    def ledger(self) -> dict[str, Any]:
        """As it stands in outputs/<run>/ledger.json: rows read = rows trained on + rows named, in each split."""
        return {"stage": self.stage, **{split: ledger.to_dict() for split, ledger in self.ledgers.items()}}


def read(
    stage: store.Stage, encoder: Encoder, *, questions: int, on_progress: Callable[[int, int], None] | None = None
) -> Rows:
    """Reads and encodes the training and validation rows. Raises DataError if none is left to train on."""
    rows = store.read_rows(stage.train)
    encoded, ledger = encode_all(encoder, rows, on_progress)
    held = store.read_rows(stage.val) if stage.val is not None else []
    held_encoded, held_ledger = _validation(encoder, held)
    kept = {row.id for row in held_encoded}
    asked = [row for row in held if records.row_id(row) in kept and records.reference(row).strip()][:questions]
    return Rows(
        stage=stage.name,
        train=_features(encoded),
        validation=_features(held_encoded),
        questions=[_question(row, encoder) for row in asked],
        hashes={str(path.name): files.sha256(path) for path in (stage.train, stage.val) if path is not None},
        ledgers={"train": ledger, "val": held_ledger},
        system=system_text.shared_by(rows),
    )


def _validation(encoder: Encoder, held: list[Row]) -> tuple[list[Encoded], RunLedger]:
    if not held:
        return [], RunLedger()
    try:
        return encode_all(encoder, held)
    except DataError as error:
        log.warning("no validation row can be used, so nothing is evaluated while training: %s", error.what)
        return [], RunLedger(rows_read=len(held), dropped={error.what: [records.row_id(row) for row in held]})


def _features(encoded: list[Encoded]) -> list[Feature]:
    return [{"id": row.id, "input_ids": row.input_ids, "labels": row.labels} for row in encoded]


def _question(row: Row, encoder: Encoder) -> Question:
    if records.is_rendered(row):
        return Question(row, encoder.prompt(row), str(row["input"]), records.reference(row))
    asked = [turn for turn in records.messages(row) if turn["role"] == "user"]
    source = str(asked[-1].get("content") or "") if asked else ""
    return Question(row, encoder.prompt(row), source, records.reference(row))
