"""The rows of a run: read, rendered, tokenised and labelled, with every one that is not trained on named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sft import files
from sft.chat.dataset import RunLedger, Split, Tokenised, Tokeniser
from sft.chat.encode import Encoder
from sft.data import rows, store
from sft.generation import load
from sft.generation.evaluate import Question, answerable
from sft.training.windows import Feature

log = logging.getLogger("sft.training")
Row = dict[str, Any]
NO_SPLIT = Split(Tokenised(), RunLedger(), None, [], False)


@dataclass(frozen=True)
class Rows:
    """Features `{"id", "input_ids", "labels"}` to train and evaluate on; where they came from; every row's fate."""

    stage: str
    train: Sequence[Feature]
    validation: Sequence[Feature]
    asked: list[Row]  # the validation rows that are answered at each evaluation
    hashes: dict[str, str]  # SHA-256 of each file that was read
    ledgers: dict[str, RunLedger]
    system: str | None = None  # the system text that every training row shares
    longest: int = 0  # tokens of the longest training row
    leaks: int = 0  # validation rows that ask what a training row asks
    questions: list[Question] = field(default_factory=list)  # `asked` as `eval` asks them, once there is a model
    kept: list[str] = field(default_factory=list)  # splits whose tokens were kept from an earlier start

    def ledger(self) -> dict[str, Any]:
        """As it stands in outputs/<run>/ledger.json: rows read = rows trained on + rows named, in each split."""
        splits = {split: ledger.to_dict() for split, ledger in self.ledgers.items()}
        return {"stage": self.stage, **splits, "validation_rows_given_away": self.leaks}


def read(
    stage: store.Stage,
    encoder: Encoder,
    *,
    questions: int,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """The training and validation rows, encoded, or as they are kept in `cache`. Raises DataError if none is left."""
    hashes = {path: files.sha256(path) for path in (stage.train, stage.val) if path is not None}
    tokenise = Tokeniser(encoder, cache)
    train = tokenise(stage.train, hashes[stage.train], about=load.shared_system_text, on_progress=on_progress)
    if not train.rows:
        raise train.ledger.nothing_left(encoder.template.name)
    held = NO_SPLIT if stage.val is None else tokenise(stage.val, hashes[stage.val])
    if held.ledger.rows_read and not held.rows:
        why = held.ledger.nothing_left(encoder.template.name).what
        log.warning("no validation row can be used, so nothing is evaluated while training: %s", why)
    return Rows(
        stage=stage.name,
        train=train.rows,
        validation=held.rows,
        asked=list(islice(_asked(stage.val, held.ledger), questions)),
        hashes={path.name: digest for path, digest in hashes.items()},
        ledgers={"train": train.ledger, "val": held.ledger},
        system=train.about,
        longest=int(train.rows.lengths().max()),
        leaks=_leaks(train.rows, held.rows),
        kept=[name for name, split in (("train", train), ("val", held)) if split.kept],
    )


def _leaks(train: Tokenised, held: Tokenised) -> int:
    """Counts, and says, the validation rows that ask what a training row asks: they tell little of what is new."""
    count = int(np.isin(held.asks(), train.asks()).sum())
    if count:
        log.warning("%d of %d validation rows ask what a training row asks: their loss flatters", count, len(held))
    return count


def _asked(path: Path | None, ledger: RunLedger) -> Iterator[Row]:
    """The validation rows that can be answered: encoded, and with an answer to compare with."""
    dropped = {name for names in ledger.dropped.values() for name in names}
    for row in store.iter_rows(path) if path is not None else ():
        if rows.row_id(row) not in dropped and answerable(row):
            yield row
