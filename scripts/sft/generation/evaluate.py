"""Rows as questions, their answers scored, and a run's tuned and base side measured on the same rows."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sft import files, runs
from sft.chat.dataset import fingerprint
from sft.config.load import display_path, resolve_path
from sft.config.schema import Config
from sft.data import rows as records
from sft.data import shards, store
from sft.errors import ConfigError, DataError, EnvironmentProblem, one_line
from sft.generation.engine import LoadedModel, Progress, warn_truncated
from sft.generation.load import Target, open_sides
from sft.generation.stop import Answer
from sft.metrics import scoring, text
from sft.step import attention
from sft.step.step import StepConfig, evaluate_loss

log = logging.getLogger("sft.generation")
Row = dict[str, Any]
Message = dict[str, Any]
Prompt = Callable[[Row], tuple[list[int], int]]  # a row's prompt ids, and how many oldest turns were removed
SPARE_SHOTS = 8  # examples beyond `eval.shots`: some may have the row's own question
FIRST_ROWS = 100_000  # of the training rows that examples and constant answers come from
LOSS_TOKENS = 4096
PACKAGE = Path(__file__).resolve().parents[1]
CODE = ("generation", "metrics", "step")  # packages that the base's stored answers depend on, besides the encoder's
CACHE, MAX_STORED = ".cache/base_answers", 16


@dataclass(frozen=True)
class Question:
    """A row as a question: its prompt's ids, the question's text, the reference answer, and every correct answer.

    id: the row's, and the number of the answer where all are evaluated. turns_removed: oldest turns left out of a
    prompt that was too long.
    """

    row: Row
    ids: list[int]
    source: str
    reference: str
    options: list[str]
    id: str
    turns_removed: int = 0


def questions(prompt: Prompt, rows: Sequence[Row], config: Config, root: Path) -> list[Question]:
    """The rows' last answers, or all of them (`eval.turns`), each after `eval.shots` training rows as examples.

    Raises DataError for a row without an answer to compare with, ConfigError if there are too few training rows.
    """
    shots = _shots(config, root) if config.eval.shots else []
    result = [question for row in rows for question in _of_row(prompt, row, config, shots)]
    warn_truncated([question.turns_removed for question in result], "turns")
    return result


def answerable(row: Row) -> bool:
    """Whether a row has a question and an answer to compare with, which is not rated as bad."""
    return not records.is_bad(row) and bool(
        records.reference(row).strip() if records.is_rendered(row) else answer_turns(row)
    )


def answer_turns(row: Row) -> list[int]:
    """The indices of a conversation's assistant turns that have text and follow a question."""
    turns = records.messages(row)
    first = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    return [at for at, turn in enumerate(turns) if turn["role"] == "assistant" and at > first and _text(turn).strip()]


def _shots(config: Config, root: Path) -> list[Row]:
    """Training rows as examples, drawn with `generation.seed` from the first FIRST_ROWS: conversations of one question,
    without tools.
    """
    path = store.resolve_stage(config.data, root).train
    rows = [row for row in islice(store.iter_rows(path), FIRST_ROWS) if _is_single_exchange(row)]
    if len(rows) < config.eval.shots:
        what = f"eval.shots is {config.eval.shots}, but {path.name} has {len(rows)} rows of one question and one answer"
        raise ConfigError(what, where="eval.shots", fix=f"--set eval.shots={len(rows)}")
    return random.Random(config.generation.seed).sample(rows, min(len(rows), config.eval.shots + SPARE_SHOTS))


def _is_single_exchange(row: Row) -> bool:
    if records.is_rendered(row) or records.tools(row) or records.is_bad(row):
        return False
    return [turn["role"] for turn in records.messages(row) if turn["role"] != "system"] == ["user", "assistant"]


def _of_row(prompt: Prompt, row: Row, config: Config, shots: Sequence[Row]) -> Iterator[Question]:
    if not answerable(row):
        raise DataError("a row has no answer to compare with", where=str(row.get("origin", records.row_id(row))))
    if records.is_rendered(row):
        if config.eval.shots:
            raise ConfigError("rendered rows cannot have examples in front", where="eval.shots", fix="set it to 0")
        yield Question(
            row, prompt(row)[0], str(row["input"]), records.reference(row), records.references(row), records.row_id(row)
        )
        return
    messages, places, tools = records.messages(row), answer_turns(row), records.tools(row)
    question = records.question(row).strip()
    others = [shot for shot in shots if records.question(shot).strip() != question][: config.eval.shots]
    examples = [turn for shot in others for turn in records.messages(shot) if turn["role"] != "system"]
    for number, at in enumerate(places):
        is_last = at == places[-1]
        if config.eval.turns == "last" and not is_last:
            continue
        history = messages[:at]
        system = [turn for turn in history if turn["role"] in ("system", "developer")]
        shown = [*system, *examples, *(turn for turn in history if turn not in system)] if examples else history
        ids, removed = prompt({"messages": shown, "tools": tools})
        source = next((_text(turn) for turn in reversed(history) if turn["role"] == "user"), "")
        correct = records.references(row) if is_last and row.get("references") else [_text(messages[at])]
        id_ = records.row_id(row) + (f"#{number}" if config.eval.turns == "all" else "")
        yield Question(row, ids, source, _text(messages[at]), correct, id_, removed)


def _text(turn: Message) -> str:
    content = turn.get("content")
    return content if isinstance(content, str) else ""


@dataclass(frozen=True)
class Evaluation:
    """metrics: {name: value}. samples: a dictionary a row. values: {name: of each answer}, and row_losses the mean loss
    of each row, nan without one.

    fields: share of rows with each JSON field right. by_tag: for each tag of the rows, how many have it and their
    metrics. at: when this was.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    values: dict[str, list[float]]
    fields: dict[str, float]
    by_tag: dict[str, dict[str, float]]
    row_losses: list[float] = field(default_factory=list)
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))


def held_out_rows(
    config: Config, split: str | None, limit: int | None, root: Path, model: Path | None = None
) -> tuple[str, list[Row], Path]:
    """The split's name, its first `limit` rows (None: `eval.limit`; 0: all), and the training file.

    split: None is test if there is one, else val. model: an adapter or model; a warning says if it was trained on other
    rows than the training file has now. Raises DataError if there are no such rows.
    """
    stage = store.resolve_stage(config.data, root)
    split = split or ("test" if stage.test is not None else "val")
    path = stage.test if split == "test" else stage.val
    most = (config.eval.limit if limit is None else limit) or None
    rows = list(islice((row for row in store.iter_rows(path) if not records.is_bad(row)), most)) if path else []
    if not rows:
        raise DataError(f"there are no {split} rows", where=str(path or f"data.{split}_path"), fix="make process")
    digest = files.read_json(model / runs.FINGERPRINT).get("data", {}).get(stage.train.name) if model else None
    if model and digest and digest != shards.digest(stage.train):
        log.warning(
            "%s has changed since %s was trained: rows that it was trained on may be among these %s rows now,"
            " and their scores too good; train again to be sure", display_path(stage.train, root), model.name, split,
        )  # fmt: skip
    return split, rows, stage.train


def evaluate(
    loaded: LoadedModel, rows: Sequence[Row], config: Config, root: Path, on_progress: Progress | None = None
) -> Evaluation:
    """Answers every row and scores the answers with `eval.metrics`; adds loss, perplexity, length, stop rate, ..."""
    of_rows = questions(lambda row: loaded.prompt(row, config.generation), rows, config, root)
    prompts = [question.ids for question in of_rows]
    answers = loaded.generate(prompts, config.generation, config.eval.batch_size, on_progress)
    warn_truncated([answer.truncated for answer in answers], "tokens")
    loss, row_losses = losses(loaded, rows, config)
    result = score_answers(of_rows, answers, config, root)
    return replace(result, metrics=result.metrics | loss, row_losses=row_losses)


def evaluate_base(
    loaded: LoadedModel, rows: Sequence[Row], config: Config, root: Path, on_progress: Progress | None = None
) -> Evaluation:
    """`evaluate` of a model without adapter or with its adapter off; stored, and read again where nothing differs.

    What counts: weights, their type and device, encoder, rows, examples, settings, and the code of answers and scores.
    """
    shots = shards.digest(store.resolve_stage(config.data, root).train) if config.eval.shots else ""
    tuning, (_, schema) = config.tuning, metric_names(config, root)
    settings = (config.eval.model_dump_json(), config.generation.model_dump_json(), config.train.objective)
    path = stored_path(loaded, root, rows, shots, (tuning.quant_type, tuning.double_quant), settings, schema)
    if stored := files.read_json(path):
        log.info("the base's answers of %s are used again: base, rows and settings are the same", stored["at"])
        if on_progress is not None:
            on_progress(len(rows), len(rows))
        return Evaluation(**stored)
    result = evaluate(loaded, rows, config, root, on_progress)
    write_stored(path, vars(result))
    return result


def stored_path(loaded: LoadedModel, root: Path, *content: Any) -> Path:
    """Where a base's answers to `content` are stored: a file for each base, its type and device, encoder and code."""
    code = [files.sha256(path) for name in CODE for path in sorted(PACKAGE.glob(f"{name}/*.py"))]
    base = loaded.base
    stored = getattr(base, "sft_base", None) or {}  # unsloth's models have none: their caller's content names them
    weights = (stored.get("fingerprint"), str(base.dtype), getattr(base, "is_loaded_in_4bit", None))
    parts = json.dumps([code, weights, loaded.device, fingerprint(loaded.encoder), content])
    return root / CACHE / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"


def write_stored(path: Path, answers: Mapping[str, Any]) -> None:
    """Writes answers to their `stored_path` and removes the oldest ones; a disk that refuses is a warning."""
    try:
        files.write_text(path, json.dumps(answers, ensure_ascii=False))
        for old in sorted(path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-MAX_STORED]:
            old.unlink(missing_ok=True)
    except (OSError, EnvironmentProblem) as error:
        log.warning("the base's answers cannot be stored for the next time: %s", one_line(error))


def losses(loaded: LoadedModel, rows: Sequence[Row], config: Config) -> tuple[dict[str, float], list[float]]:
    """Loss and perplexity over the rows' labelled tokens, as in training, and each row's mean loss.

    A row's loss is nan if it has none (too long, no label left); the metrics are empty if no row has one.
    """
    encoded = [loaded.encoder.encode(row) for row in rows]
    used = [index for index, row in enumerate(encoded) if row.dropped is None]
    if len(used) < len(rows):
        missing = len(rows) - len(used)
        log.warning("%d of %d rows have no loss (too long, or no label left): see `make preview`", missing, len(rows))
    step_config = StepConfig(
        kind=loaded.kind,
        device=loaded.device,
        micro_batch_tokens=LOSS_TOKENS,
        packed=loaded.kind == "causal" and attention.keeps_rows_apart(loaded.model),
        objective=config.train.objective,
        logits=config.train.logits,
        logits_tile=config.train.logits_tile,
    )
    features = [{"input_ids": encoded[index].input_ids, "labels": encoded[index].labels} for index in used]
    loss = evaluate_loss(loaded.model, features, step_config)
    of_rows = [math.nan] * len(rows)
    for index, mean in zip(used, (loss.row_sums / loss.row_counts).tolist(), strict=True):
        of_rows[index] = mean
    if not loss.count:
        return {}, of_rows
    mean = loss.loss_sum / loss.count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}, of_rows


def score_answers(of_rows: Sequence[Question], answers: Sequence[Answer], config: Config, root: Path) -> Evaluation:
    """The answers' metrics: their means, each answer's own, and by tag."""
    names, schema = metric_names(config, root)
    texts, references = [answer.text for answer in answers], [question.options for question in of_rows]
    scores = scoring.score_rows(
        names, texts, references, [question.source for question in of_rows],
        stemmer=config.eval.rouge_stemmer, json_schema=schema, pattern=scoring.compiled(config.eval.format),
    )  # fmt: skip
    tags = [text.tags_of(question.row) for question in of_rows]
    samples = [
        {
            "id": question.id,
            "prompt": question.source,
            "prediction": answer.text,
            "reference": question.reference,
            **({"references": question.options} if len(question.options) > 1 else {}),
            **({"tags": row_tags} if row_tags else {}),
            "stopped": answer.stopped,
            **({"looped": True} if answer.looped else {}),
            "tokens": answer.tokens,
            "scores": scores.of_row(index),
        }
        for index, (question, answer, row_tags) in enumerate(zip(of_rows, answers, tags, strict=True))
    ]
    stats = text.text_stats(
        texts, stopped=[answer.stopped for answer in answers], tokens=[answer.tokens for answer in answers]
    )
    if config.generation.stop_loops:
        stats["loop_rate"] = [float(answer.looped) for answer in answers]
    per_tag = {name: values for name, values in stats.items() if not name.startswith("length")}
    return Evaluation(
        scores.means | text.means(stats),
        samples,
        scores.rows | stats,
        scoring.by_field(texts, references) if "json_fields" in names else {},
        scoring.by_tag(tags, scores, texts, references, per_tag),
    )


def metric_names(config: Config, root: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The metrics by name, `format_adherence` always and `json_schema` where a schema is set, and that schema."""
    names = scoring.check_names([*config.eval.metrics, "format_adherence"])
    if config.eval.json_schema is None:
        return names, None
    schema = scoring.read_schema(resolve_path(root, config.eval.json_schema))
    return list(dict.fromkeys([*names, "json_schema"])), schema


def evaluate_sides(
    target: Target, sides: Sequence[str], rows: Sequence[Row], root: Path, on_progress: Progress | None = None
) -> dict[str, Evaluation]:
    """Answers and scores the rows with each of the sides ("tuned", "base").

    Metric names and schema are checked before a model is opened. on_progress counts the answers of all sides together.
    """
    metric_names(target.config, root)
    result: dict[str, Evaluation] = {}

    def of_all(done: float, total: int) -> None:
        if on_progress is not None:
            on_progress(len(result) * total + done, len(sides) * total)

    for side, loaded in open_sides(target, sides, root):
        measure = evaluate_base if side == "base" else evaluate
        result[side] = measure(loaded, rows, target.config, root, of_all)
        del loaded  # before the next side is opened
    return result


def constant_baseline(config: Config, train: Path, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The scores of the best constant answer: one training answer (of the first FIRST_ROWS rows) to every question;
    None without rows.
    """
    try:
        answers = [records.reference(row) for row in islice(store.iter_rows(train), FIRST_ROWS)]
    except DataError:
        return None
    references = [records.reference(row) for row in rows]
    return scoring.constant_baseline(answers, references, stemmer=config.eval.rouge_stemmer)
