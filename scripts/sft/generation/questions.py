"""Rows as questions: the prompt that is asked, the answers that count as right, the examples in front of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config.schema import Config
from sft.data import records, store
from sft.errors import ConfigError, DataError
from sft.generation.serving import Served
from sft.metrics import tags

log = logging.getLogger("sft.generation")
Row = dict[str, Any]
Message = dict[str, Any]
SPARE = 8  # more examples than are shown: one of them may be the row itself


@dataclass(frozen=True)
class Question:
    """A row as a question: its prompt's ids, the text that is asked, and the answer it should get.

    turns_lost: oldest turns left out, since the prompt was too long. references: all answers that count as right, where
    they are not those of the row. turn: which of the row's answers this is (0 the first), where all are asked.
    """

    row: Row
    ids: list[int]
    source: str
    reference: str
    turns_lost: int = 0
    references: tuple[str, ...] = ()
    turn: int | None = None

    @property
    def options(self) -> list[str]:
        """Every answer that counts as right."""
        return list(self.references) or records.references(self.row)

    @property
    def id(self) -> str:
        """The row's id, and which of its answers where all are asked."""
        name = records.row_id(self.row)
        return name if self.turn is None else f"{name}#{self.turn}"

    @property
    def tags(self) -> list[str]:
        return tags.of(self.row)


def questions(served: Served, rows: Sequence[Row], config: Config, root: Path | None = None) -> list[Question]:
    """The rows' last answers, or all of them (`eval.turns`), each asked after `eval.shots` training rows.

    Raises DataError for a row that has no answer to compare with, ConfigError where there are too few training rows.
    """
    shots = examples(config, root) if config.eval.shots and root is not None else []
    made = [question for row in rows for question in _of_row(served, row, config, shots)]
    if lost := [question for question in made if question.turns_lost]:
        turns = sum(question.turns_lost for question in lost)
        log.warning("%d prompts are too long for the model: they lost their oldest %d turns", len(lost), turns)
    return made


def examples(config: Config, root: Path) -> list[Row]:
    """Training rows to show, drawn with `generation.seed`: conversations of one question, without tools."""
    path = store.paths(config.data, root).train
    rows = [row for row in store.iter_rows(path) if _shows(row)]
    if len(rows) < config.eval.shots:
        raise ConfigError(
            f"eval.shots is {config.eval.shots}, but {path.name} has {len(rows)} rows of one question and one answer",
            where="eval.shots",
            mend=f"--set eval.shots={len(rows)}",
        )
    return random.Random(config.generation.seed).sample(rows, min(len(rows), config.eval.shots + SPARE))


def _shows(row: Row) -> bool:
    if records.is_rendered(row) or records.tools(row):
        return False
    return [turn["role"] for turn in records.messages(row) if turn["role"] != "system"] == ["user", "assistant"]


def _of_row(served: Served, row: Row, config: Config, shots: Sequence[Row]) -> Iterator[Question]:
    if records.is_rendered(row):
        if config.eval.shots:
            raise ConfigError("rendered rows cannot have examples in front", where="eval.shots", mend="set it to 0")
        _must_have_answer(row, records.reference(row))
        yield Question(row, served.encoder.prompt(row), str(row["input"]), records.reference(row))
        return
    messages = records.messages(row)
    answers = [at for at, turn in enumerate(messages) if turn["role"] == "assistant" and _text(turn).strip()]
    answers = [at for at in answers if any(turn["role"] == "user" for turn in messages[:at])]
    _must_have_answer(row, "x" if answers else "")
    last, before = answers[-1], _turns(row, shots, config.eval.shots)
    for number, at in enumerate(answers):
        if config.eval.turns == "last" and at != last:
            continue
        history = messages[:at]
        system = [turn for turn in history if turn["role"] in ("system", "developer")]
        shown = [*system, *before, *(turn for turn in history if turn not in system)] if before else history
        ids, lost = served.prompt(shown, config.generation, records.tools(row))
        source = next((_text(turn) for turn in reversed(history) if turn["role"] == "user"), "")
        right = records.references(row) if at == last else [_text(messages[at])]
        turn = number if config.eval.turns == "all" else None
        yield Question(row, ids, source, _text(messages[at]), lost, tuple(right), turn)


def _turns(row: Row, shots: Sequence[Row], count: int) -> list[Message]:
    """The turns of the first examples that are neither the row itself nor ask what it asks."""
    asked = records.question(row).strip()
    others = [shot for shot in shots if records.question(shot).strip() != asked]
    return [turn for shot in others[:count] for turn in records.messages(shot) if turn["role"] != "system"]


def _text(turn: Message) -> str:
    content = turn.get("content")
    return content if isinstance(content, str) else ""


def _must_have_answer(row: Row, answer: str) -> None:
    if not answer.strip():
        raise DataError("a row has no answer to compare with", where=str(row.get("origin", records.row_id(row))))
