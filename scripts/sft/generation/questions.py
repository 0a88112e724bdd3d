"""Rows as questions: the prompt that is asked, the answers that count as right, the examples in front of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config.schema import Config
from sft.data import records, store
from sft.errors import ConfigError, DataError
from sft.generation.room import say_lost
from sft.metrics import tags

Row = dict[str, Any]
Message = dict[str, Any]
Prompt = Callable[[Row], tuple[list[int], int]]  # a row's prompt ids, and the oldest turns that it lost
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


def questions(prompt: Prompt, rows: Sequence[Row], config: Config, root: Path) -> list[Question]:
    """The rows' last answers, or all of them (`eval.turns`), each asked after `eval.shots` training rows.

    Evaluation, comparison and the answers while training ask alike: all of them ask through this.

    Raises DataError for a row that has no answer to compare with, ConfigError where there are too few training rows.
    """
    shots = examples(config, root) if config.eval.shots else []
    made = [question for row in rows for question in _of_row(prompt, row, config, shots)]
    say_lost([question.turns_lost for question in made], "turns")
    return made


def answerable(row: Row) -> bool:
    """Whether a row asks something and has an answer to compare with."""
    return bool(records.reference(row).strip() if records.is_rendered(row) else answers(row))


def answers(row: Row) -> list[int]:
    """The places of a conversation's turns that answer something in words."""
    turns = records.messages(row)
    first = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    return [at for at, turn in enumerate(turns) if turn["role"] == "assistant" and at > first and _text(turn).strip()]


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


def _of_row(prompt: Prompt, row: Row, config: Config, shots: Sequence[Row]) -> Iterator[Question]:
    if not answerable(row):
        raise DataError("a row has no answer to compare with", where=str(row.get("origin", records.row_id(row))))
    if records.is_rendered(row):
        if config.eval.shots:
            raise ConfigError("rendered rows cannot have examples in front", where="eval.shots", mend="set it to 0")
        yield Question(row, prompt(row)[0], str(row["input"]), records.reference(row))
        return
    messages, places, tools = records.messages(row), answers(row), records.tools(row)
    last, before = places[-1], _turns(row, shots, config.eval.shots)
    for number, at in enumerate(places):
        if config.eval.turns == "last" and at != last:
            continue
        history = messages[:at]
        system = [turn for turn in history if turn["role"] in ("system", "developer")]
        shown = [*system, *before, *(turn for turn in history if turn not in system)] if before else history
        ids, lost = prompt({"messages": shown, "tools": tools})
        source = next((_text(turn) for turn in reversed(history) if turn["role"] == "user"), "")
        right = records.references(row) if at == last and row.get("references") else [_text(messages[at])]
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
