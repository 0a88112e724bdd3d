"""A model's answers to rows, and what they are worth: metrics of the text, and the loss on the labelled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft import metrics
from sft.config.paths import resolve
from sft.config.schema import Config
from sft.generation import engine
from sft.generation.losses import losses
from sft.generation.questions import Question, Row, questions
from sft.generation.room import say_lost
from sft.generation.serving import Served
from sft.metrics import form, schema, scoring, text

__all__ = ["Evaluation", "Question", "Row", "evaluate", "losses", "questions", "scored", "wanted"]
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
    served: Served, rows: Sequence[Row], config: Config, root: Path, on_progress: Progress | None = None
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
    names, loaded = wanted(config, root)
    scores = metrics.score_rows(
        names,
        texts,
        references,
        [question.source for question in asked],
        stemmer=config.eval.rouge_stemmer,
        json_schema=loaded,
        pattern=form.compiled(config.eval.format),
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
    fields = schema.by_field(texts, references) if "json_fields" in names else {}
    of_rows = {
        "stop_rate": [float(answer.stopped) for answer in answers],
        "empty_rate": [text.empty(one) for one in texts],
        "repetition": [text.repetition(one) for one in texts],
    }
    by_tag = scoring.by_tag([question.tags for question in asked], scores, texts, references, of_rows)
    return Evaluation({**scores.means, **(loss or {}), **stats}, samples, fields, by_tag)


def wanted(config: Config, root: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The metrics by name, `format_adherence` always and `json_schema` where a schema is given, and that schema."""
    names = metrics.check_names([*config.eval.metrics, "format_adherence"])
    if config.eval.json_schema is None:
        return names, None
    loaded = schema.load(resolve(root, config.eval.json_schema))
    return list(dict.fromkeys([*names, "json_schema"])), loaded
