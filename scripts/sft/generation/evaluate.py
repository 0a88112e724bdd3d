"""Rows as questions: the prompt that is asked, the answers that count as right, the examples in front of it."""

from __future__ import annotations

import gc
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft import metrics
from sft.config.load import resolve_path
from sft.config.schema import Config
from sft.data import rows as records
from sft.data import store
from sft.errors import ConfigError, DataError
from sft.generation import engine, load
from sft.generation.engine import say_lost
from sft.generation.load import LoadedModel, Target
from sft.metrics import scoring, text
from sft.step import attention
from sft.step.step import StepConfig, evaluate_loss

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
        return text.of(self.row)


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
            fix=f"--set eval.shots={len(rows)}",
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
            raise ConfigError("rendered rows cannot have examples in front", where="eval.shots", fix="set it to 0")
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


log = logging.getLogger("sft.generation")
LOSS_TOKENS = 4096


def losses(served: LoadedModel, rows: Sequence[Row], config: Config) -> dict[str, float]:
    """Mean cross-entropy over the rows' labelled tokens (as in training), and its exponential, the perplexity."""
    encoded = [served.encoder.encode(row) for row in rows]
    features = [{"input_ids": one.input_ids, "labels": one.labels} for one in encoded if one.dropped is None]
    if left_out := len(rows) - len(features):
        log.warning(
            "%d of %d rows have no loss (too long, or no label left): `make preview` shows them", left_out, len(rows)
        )
    step_config = StepConfig(
        kind=served.kind,
        device=str(served.device),
        micro_batch_tokens=LOSS_TOKENS,
        packed=served.kind == "causal" and attention.keeps_rows_apart(served.model),
        objective=config.train.objective,
        logits=config.train.logits,
        logits_tile=config.train.logits_tile,
    )
    evaluated = evaluate_loss(served.model, features, step_config)
    if not evaluated.count:
        return {}
    mean = evaluated.loss_sum / evaluated.count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """metrics: {name: value}. samples: a dictionary a row. fields: share of rows with each JSON field right.

    by_tag: for each tag of the rows, how many have it and their metrics.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    fields: dict[str, float] = field(default_factory=dict)
    by_tag: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate(
    served: LoadedModel, rows: Sequence[Row], config: Config, root: Path, on_progress: Progress | None = None
) -> Evaluation:
    """Answers every row and scores the answers with `eval.metrics`; adds loss, perplexity, length, stop rate, ..."""
    asked = questions(lambda row: served.prompt(row, config.generation), rows, config, root)
    answers = engine.generate(
        served.model,
        served.tokenizer,
        [question.ids for question in asked],
        config.generation,
        served.encoder.stops,
        batch_size=config.eval.batch_size,
        kind=served.kind,
        on_progress=on_progress,
    )
    say_lost([answer.truncated for answer in answers], "tokens")
    return scored(asked, answers, config, root, losses(served, rows, config))


def scored(
    asked: Sequence[Question],
    answers: Sequence[engine.Answer],
    config: Config,
    root: Path,
    loss: dict[str, float] | None = None,
) -> Evaluation:
    """The metrics of the answers, their means and each row's own."""
    texts = [answer.text for answer in answers]
    references = [question.options for question in asked]
    names, loaded = metric_names(config, root)
    scores = metrics.score_rows(
        names,
        texts,
        references,
        [question.source for question in asked],
        stemmer=config.eval.rouge_stemmer,
        json_schema=loaded,
        pattern=scoring.compiled(config.eval.format),
    )
    stats = metrics.text_stats(
        texts, stopped=[answer.stopped for answer in answers], tokens=[answer.tokens for answer in answers]
    )
    samples = [
        {
            "id": question.id,
            "prompt": question.source,
            "prediction": answer.text,
            "reference": question.reference,
            **({"references": question.options} if len(question.options) > 1 else {}),
            **({"tags": question.tags} if question.tags else {}),
            "stopped": answer.stopped,
            "tokens": answer.tokens,
            "scores": scores.of_row(index),
        }
        for index, (question, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    fields = scoring.by_field(texts, references) if "json_fields" in names else {}
    of_rows = {
        "stop_rate": [float(answer.stopped) for answer in answers],
        "empty_rate": [text.empty(one) for one in texts],
        "repetition": [text.repetition(one) for one in texts],
    }
    by_tag = scoring.by_tag([question.tags for question in asked], scores, texts, references, of_rows)
    return Evaluation({**scores.means, **(loss or {}), **stats}, samples, fields, by_tag)


def metric_names(config: Config, root: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The metrics by name, `format_adherence` always and `json_schema` where a schema is given, and that schema."""
    names = metrics.check_names([*config.eval.metrics, "format_adherence"])
    if config.eval.json_schema is None:
        return names, None
    loaded = scoring.load(resolve_path(root, config.eval.json_schema))
    return list(dict.fromkeys([*names, "json_schema"])), loaded


def evaluate_base_and_tuned(
    target: Target, wanted: Sequence[str], rows: Sequence[Row], root: Path, on_progress: Progress | None = None
) -> dict[str, Evaluation]:
    """Answers and scores the rows with each wanted side ("tuned", "base").

    With an adapter one load serves both: the base is the same model with the adapter off. on_progress counts the
    answers of all sides together.
    """
    metric_names(target.config, root)  # names and schema are checked before anything is loaded
    if target.adapter is None and len(wanted) == 2:
        return {
            side: evaluate_base_and_tuned(target, [side], rows, root, _part(on_progress, at, 2))[side]
            for at, side in enumerate(wanted)
        }
    adapter, merged = (None, None) if wanted == ["base"] else (target.adapter, target.merged)
    served = load.open_model(target.config, adapter=adapter, merged=merged, root=root)
    found = {}
    for at, side in enumerate(wanted):
        part = _part(on_progress, at, len(wanted))
        if side == "base" and len(wanted) == 2:
            with served.base_only():
                found[side] = evaluate(served, rows, target.config, root, part)
        else:
            found[side] = evaluate(served, rows, target.config, root, part)
    del served
    gc.collect()
    return found


def _part(on_progress: Progress | None, at: int, sides: int) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(at * total + done, sides * total)


def constant(target: Target, train: Path | None, rows: Sequence[Row]) -> dict[str, Any] | None:
    """What the training answer that suits these rows best would score, said to every question; None without rows."""
    if train is None:
        return None
    try:
        answers = [records.reference(row) for row in store.iter_rows(train)]
    except DataError:
        return None
    best = metrics.best_constant(
        answers, [records.reference(row) for row in rows], stemmer=target.config.eval.rouge_stemmer
    )
    return None if best is None else {"answer": best.answer, **best.scores}
