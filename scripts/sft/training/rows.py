"""The rows of a run: read, rendered, tokenised and labelled, with every one that is not trained on named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft import files
from sft.chat.encode import Encoded, Encoder, encode_all
from sft.data import records, store
from sft.errors import DataError
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
    ledger: dict[str, Any]


def read(
    stage: store.Stage, encoder: Encoder, *, questions: int, on_progress: Callable[[int, int], None] | None = None
) -> Rows:
    """Reads and encodes the training and validation rows. Raises DataError if none is left to train on."""
    if stage.train is None:
        raise DataError("there are no training rows", where="data.train_path", mend="make process")
    raw = store.read_rows(stage.train)
    encoded, ledger = encode_all(encoder, raw, on_progress)
    train = _features(encoded)
    if not train:
        raise DataError("no row is left to train on", where=str(stage.train), mend="make preview shows why")
    held = store.read_rows(stage.val) if stage.val is not None else []
    held_encoded, held_ledger = encode_all(encoder, held, None) if held else ([], None)
    validation = _features(held_encoded)
    answered = {feature["id"] for feature in validation}
    asked = [row for row in held if records.row_id(row) in answered][:questions]
    return Rows(
        stage=stage.name,
        train=train,
        validation=validation,
        questions=[_question(row, encoder) for row in asked],
        hashes={str(path.name): files.sha256(path) for path in (stage.train, stage.val) if path is not None},
        ledger={"train": _told(ledger, raw, train), "val": _told(held_ledger, held, validation)},
    )


def _features(encoded: list[Encoded]) -> list[Feature]:
    kept = [row for row in encoded if row.dropped is None]
    return [{"id": row.id, "input_ids": row.input_ids, "labels": row.labels} for row in kept]


def _question(row: Row, encoder: Encoder) -> Question:
    if records.is_rendered(row):
        return Question(row, encoder.prompt(row), str(row["input"]), records.reference(row))
    asked = [turn for turn in records.messages(row) if turn["role"] == "user"]
    source = str(asked[-1].get("content") or "") if asked else ""
    return Question(row, encoder.prompt(row), source, records.reference(row))
