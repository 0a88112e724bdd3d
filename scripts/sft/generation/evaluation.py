"""A model's answers to rows, and what they are worth: metrics of the text, and the loss on the labelled tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft import metrics
from sft.config.paths import resolve
from sft.config.schema import Config
from sft.data import records
from sft.errors import DataError
from sft.generation import engine
from sft.generation.serving import Served
from sft.metrics import schema
from sft.step import attention
from sft.step.microbatch import loss_sum, out_of_memory
from sft.step.window import Collator, MicroBatch, cut

log = logging.getLogger("sft.generation")
LOSS_TOKENS = 4096
Row = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """A row as a question: its prompt's ids, the text that is asked, and the answer it should get."""

    row: Row
    ids: list[int]
    source: str
    reference: str
    turns_lost: int = 0


@dataclass(frozen=True)
class Evaluation:
    """metrics: {name: value}. samples: a dictionary a row. fields: share of rows with each JSON field right."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    fields: dict[str, float] = field(default_factory=dict)


def questions(served: Served, rows: Sequence[Row], config: Config) -> list[Question]:
    """Prompts and references of the rows. Raises DataError for a row that has no answer to compare with."""
    made = [_question(served, row, config) for row in rows]
    if lost := [question for question in made if question.turns_lost]:
        turns = sum(question.turns_lost for question in lost)
        log.warning("%d prompts are too long for the model: they lost their oldest %d turns", len(lost), turns)
    return made


def _question(served: Served, row: Row, config: Config) -> Question:
    reference = records.reference(row)
    if not reference.strip():
        raise DataError("a row has no answer to compare with", where=str(row.get("origin", records.row_id(row))))
    if records.is_rendered(row):
        return Question(row, served.encoder.prompt(row), str(row["input"]), reference)
    turns = list(records.messages(row))
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    source = str(turns[-1].get("content") or "") if turns else ""
    ids, lost = served.encoder.prompt(row), 0
    room = engine.prompt_room(served.model, config.generation, served.kind)
    if room is not None and len(ids) > room and not records.tools(row):
        ids, lost = served.prompt(turns, config.generation)
    return Question(row, ids, source, reference, lost)


def evaluate(
    served: Served, rows: Sequence[Row], config: Config, root: Path, on_progress: Progress | None = None
) -> Evaluation:
    """Answers every row and scores the answers with `eval.metrics`; adds loss, perplexity, length, stop rate, ..."""
    asked = questions(served, rows, config)
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
    if cut_short := [answer for answer in answers if answer.truncated]:
        tokens = sum(answer.truncated for answer in cut_short)
        log.warning("%d prompts are too long for the model: they lost their oldest %d tokens", len(cut_short), tokens)
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
    references = [question.reference for question in asked]
    names, loaded = wanted(config, root)
    scores = metrics.score_rows(
        names,
        texts,
        references,
        [question.source for question in asked],
        stemmer=config.eval.rouge_stemmer,
        json_schema=loaded,
    )
    stats = metrics.text_stats(
        texts, stopped=[answer.stopped for answer in answers], tokens=[answer.tokens for answer in answers]
    )
    samples = [
        {
            "id": records.row_id(question.row),
            "prompt": question.source,
            "prediction": answer.text,
            "reference": question.reference,
            "stopped": answer.stopped,
            "tokens": answer.tokens,
            "scores": scores.of_row(index),
        }
        for index, (question, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    fields = schema.by_field(texts, [[reference] for reference in references]) if "json_fields" in names else {}
    return Evaluation({**scores.means, **(loss or {}), **stats}, samples, fields)


def wanted(config: Config, root: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The metrics by name, `json_schema` among them where a schema is given, and that schema."""
    names = metrics.check_names(config.eval.metrics)
    if config.eval.json_schema is None:
        return names, None
    loaded = schema.load(resolve(root, config.eval.json_schema))
    return list(dict.fromkeys([*names, "json_schema"])), loaded


def losses(served: Served, rows: Sequence[Row], config: Config) -> dict[str, float]:
    """Mean cross-entropy over the rows' labelled tokens (as in training), and its exponential, the perplexity."""
    encoded = [served.encoder.encode(row) for row in rows]
    features = [
        {"input_ids": one.input_ids, "labels": one.labels}
        for one in sorted(encoded, key=lambda one: -len(one.input_ids))
        if one.dropped is None
    ]
    if left_out := len(rows) - len(features):
        log.warning(
            "%d of %d rows have no loss (too long, or no label left): `make preview` shows them", left_out, len(rows)
        )
    apart = served.kind == "causal" and attention.keeps_rows_apart(served.model)
    collate, tokens = Collator(served.kind), LOSS_TOKENS
    total, count, at = 0.0, 0, 0
    while at < len(features):
        batch = {name: value.to(served.device) for name, value in collate(features[at : at + 64]).items()}
        try:
            sums = [_loss(served, micro, config) for micro in cut(batch, tokens=tokens, apart=apart)]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or tokens < 16:
                raise
            tokens //= 2
            continue
        total, count, at = total + sum(s for s, _ in sums), count + sum(n for _, n in sums), at + 64
    if not count:
        return {}
    mean = total / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}


def _loss(served: Served, micro: MicroBatch, config: Config) -> tuple[float, int]:
    with torch.no_grad():
        value, count = loss_sum(served.model, micro, logits=config.train.logits, tile=config.train.logits_tile)
    return float(value), count
