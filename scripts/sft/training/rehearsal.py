"""Rehearsal: general questions with the base's own answers, trained on beside the task to keep the rest.

`choose` decides before any weight is loaded; `rehearse` asks the base, once, before the first step; `Rehearsal.mix`
adds rows to the steps. `consolidate` asks the same questions for elastic weight consolidation. The reasons and
measurements: docs/decisions/0021-rehearsal.md.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft import files
from sft.chat.dataset import RunLedger, TokenisedRows
from sft.chat.encode import Encoded, Encoder
from sft.chat.loss_mask import IGNORED, OVER_LENGTH
from sft.config.load import display_path, resolve_path, shipped
from sft.config.schema import Config, EwcSection, GenerationSection, RehearsalSection
from sft.data import rows as records
from sft.data.rows import RowFault, parse_json
from sft.errors import ConfigError, DataError, ModelError, RunError
from sft.generation import evaluate
from sft.generation.engine import LoadedModel, Progress
from sft.model import shard
from sft.runs import OpenRun, Run
from sft.training import distributed
from sft.training.loop import step_batches

if TYPE_CHECKING:
    from sft.step.ewc import Consolidation
    from sft.step.step import StepConfig
    from sft.training.job import Job
    from sft.training.loggers import Report

log = logging.getLogger("sft.training")

SHIPPED = "data/samples/rehearsal.jsonl"
NARROW = 150  # tokens of effective vocabulary below which answers are narrow: tickets 72, SQL 78; Alpaca 430 and more
SAMPLE = 16  # parts of the rows, of some 1,000 each, that are looked at
MIN_TRAIN_ROWS = 64  # below which `auto` is off
MAX_NEW_TOKENS = 64  # of the base's answers; what is not complete by then is not used
MIN_QUESTIONS = 48  # that `auto` puts to the base at least
LOSSES_PER_QUESTION = 16  # that it yields, about, those counted whose answers are not used
TRIAL, MIN_TRIAL, MIN_COMPLETE = 16, 4, 20  # `auto` gives up below 4 complete answers of the first 16, or 20 of all
SAMPLED = {  # drawn from the base's own distribution: greedy answers would sharpen it
    "max_new_tokens": MAX_NEW_TOKENS,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "stop": [],
    "stop_loops": True,
}
INCOMPLETE = f"the base did not end its answer within {MAX_NEW_TOKENS} tokens"
Row = dict[str, Any]
Feature = dict[str, Any]


@dataclass(frozen=True)
class Rehearsal:
    """The rows to rehearse, answered and encoded.

    rows: every question with its answer, "" without one. features: what is trained on. losses: of every row of the run,
    these rows behind the task's. share: of the losses that are to be rehearsal.
    """

    rows: list[Row]
    features: list[Feature]
    ledger: RunLedger
    losses: NDArray[np.int64]
    share: float
    seed: int

    def mix(self, steps: Iterable[list[int]]) -> Iterator[list[int]]:
        """Each step's task rows, then the rehearsal rows that are added to it, numbered behind the task's rows.

        After each step the rehearsed losses of all steps so far are as close to `share` of all losses as whole rows
        allow. Rows come in an order that `seed` decides, all of them before any is repeated. So a step depends on
        nothing but the steps before it, and a resume walks through these.
        """
        count, share = len(self.features), self.share / (1 - self.share)
        first, due, rehearsed = len(self.losses) - count, 0.0, 0
        order = (first + row for turn in itertools.count() for row in step_batches(count, count, self.seed, turn)[0])
        row = next(order)
        for task in steps:
            due += share * int(self.losses[task].sum())
            added = []
            while rehearsed + self.losses[row] / 2 <= due:
                added.append(row)
                rehearsed += int(self.losses[row])
                row = next(order)
            yield [*task, *added]

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"rows": self.rows}


def loss_counts(rows: TokenisedRows, *, causal: bool) -> NDArray[np.int64]:
    """How many losses each row has: its labels; of a causal row without the first, which no token precedes."""
    counts = [np.zeros(0, np.int64)]
    for labels, lengths in rows.labels():
        ends = np.cumsum(lengths)
        used = labels != IGNORED
        used[(ends - lengths)[lengths > 0]] &= not causal
        before = np.concatenate([[0], np.cumsum(used)])
        counts.append(before[ends] - before[ends - lengths])
    return np.concatenate(counts)


def effective_vocabulary(rows: TokenisedRows, ends: Iterable[int]) -> float:
    """How many tokens, if all were equally frequent, would be as varied as the answers' labels without end tokens.

    That is 2 to the power of their entropy in bits. Narrow answers (a form, a query's keywords, labels) use few.
    """
    counts = np.zeros(1, np.int64)
    parts = list(rows.labels())
    for labels, _ in parts[:: max(1, len(parts) // SAMPLE)]:
        ids = labels[(labels != IGNORED) & ~np.isin(labels, list(ends))]
        more = np.bincount(ids, minlength=len(counts))
        counts = more + np.pad(counts, (0, len(more) - len(counts)))
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(2 ** -(shares * np.log2(shares)).sum())


# -- before the weights are loaded -------------------------------------------------------------------------------------


def choose(
    section: RehearsalSection, train: TokenisedRows, encoder: Encoder, root: Path, due: float, stored: Row | None
) -> tuple[list[Row], str]:
    """The questions to rehearse, none for `off`, and the reason of an `auto`. Raises DataError, ConfigError.

    due: the losses to rehearse in the run, by which `auto` knows how many questions it can use. stored: of the
    checkpoint that is resumed; `auto` is then what it was when the run began, with its answers.
    """
    if section.rows == "off":
        return [], ""
    if stored is not None and section.rows in ("auto", len(rows := stored.get("rows", []))):
        return rows, "as when the run began"
    reason = ""
    if section.rows == "auto":
        tokens = effective_vocabulary(train, encoder.stops.ids)
        reason = f"the answers are as varied as {tokens:,.0f} equally frequent tokens"
        if encoder.kind == "seq2seq":
            return [], "an encoder-decoder, whose base does not chat"
        if tokens >= NARROW or len(train) < MIN_TRAIN_ROWS:
            few = f"fewer than {MIN_TRAIN_ROWS} training rows"
            return [], few if len(train) < MIN_TRAIN_ROWS else f"{reason} (narrow: below {NARROW})"
        reason += f": narrow (below {NARROW})"
    questions = read_questions(section, root)
    if isinstance(section.rows, int) and section.rows > len(questions):
        name = display_path(questions_file(section, root), root)
        what = f"train.rehearsal.rows is {section.rows}, but {name} has {len(questions)} questions"
        raise ConfigError(what, where="train.rehearsal.rows", fix=f"--set train.rehearsal.rows={len(questions)}")
    enough = max(MIN_QUESTIONS, math.ceil(due / LOSSES_PER_QUESTION))
    return questions[: section.rows if isinstance(section.rows, int) else enough], reason


def questions_file(section: RehearsalSection | EwcSection, root: Path) -> Path:
    """The section's file of questions, or ours."""
    return resolve_path(root, section.path) if section.path else shipped(root, SHIPPED)


def read_questions(section: RehearsalSection | EwcSection, root: Path) -> list[Row]:
    """The questions of a file of JSON lines, with the answers and system texts that they have. Raises DataError."""
    questions, path = [], questions_file(section, root)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else (error.strerror or "it cannot be read")
        key = "train.ewc.path" if isinstance(section, EwcSection) else "train.rehearsal.path"
        fix = f"--set {key}=FILE, or =null for ours"
        raise DataError(f"no questions to rehearse: {reason}", where=str(path), fix=fix) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, fix = f"{path}:{number}", 'one question a line: {"user": "..."}, with an "assistant" if you have it'
        try:
            row = parse_json(line)
        except RowFault as fault:
            raise DataError(fault.detail, where=where, fix=fix) from None
        texts = {name: row.get(name) for name in ("system", "user", "assistant")} if isinstance(row, dict) else {}
        if not texts.get("user") or not all(text is None or isinstance(text, str) for text in texts.values()):
            raise DataError("no question: `user` is not text", where=where, fix=fix)
        id_ = f"rehearsal:{row.get('id') or number}"
        questions.append({"id": id_, **{name: text for name, text in texts.items() if text}})
    if not questions:
        raise DataError("there is no question to rehearse in this file", where=str(path), fix='{"user": "..."}')
    return questions


def sizes(questions: Sequence[Row], encoder: Encoder, system: str | None, due: float) -> tuple[int, int]:
    """Tokens of the longest row that these questions can become, and about how many tokens they add in all.

    due: the losses to rehearse. An answer of the base counts as half the longest one.
    """
    rows = [{**({"system": system} if system else {}), "assistant": "", **row} for row in questions]
    answers = [len(encoder.tokenizer(row["assistant"])["input_ids"]) or MAX_NEW_TOKENS for row in rows]
    lengths = [len(encoder.prompt(row)) + count for row, count in zip(rows, answers, strict=True)]
    a_row = max(1.0, sum(answers) / max(1, len(rows)) / 2)
    extra = due * (1 + (sum(lengths) - sum(answers)) / max(1, len(rows)) / a_row) if rows else 0.0
    return min(encoder.max_seq_len, max(lengths, default=0)), round(extra)


# -- before the first step ---------------------------------------------------------------------------------------------


def answer(
    questions: Sequence[Row], loaded: LoadedModel, weights: str, config: Config, root: Path, *, auto: bool,
    on_progress: Progress | None = None,
) -> list[Row]:  # fmt: skip
    """The questions with the base's own sampled answers, "" where it does not end one; answers that they have stay.

    Stored like the base's answers in evaluations, and read again where nothing differs. weights: fingerprint of the
    base's files. auto: ask no further where the first answers show that the base completes few.
    """
    settings = config.generation.model_copy(update=SAMPLED)
    unanswered = [row for row in questions if "assistant" not in row]
    base = (weights, config.train.bf16, config.train.fp16, config.tuning.quant_type, config.tuning.double_quant)
    path = evaluate.stored_path(loaded, root, "rehearsal", auto, unanswered, base, settings.model_dump_json())
    texts: list[str] = files.read_json(path).get("answers", [])
    if unanswered and not texts:
        for part in (unanswered[:TRIAL], unanswered[TRIAL:]):
            if not (auto and len(texts) == TRIAL and sum(map(bool, texts)) < MIN_TRIAL):
                texts += _generate(part, loaded, settings, config, on_progress, len(texts), len(unanswered))
        evaluate.write_stored(path, {"answers": texts})
    answers = iter([*texts, *[""] * len(unanswered)])
    return [row if "assistant" in row else {**row, "assistant": next(answers)} for row in questions]


def _generate(
    rows: Sequence[Row], loaded: LoadedModel, settings: GenerationSection, config: Config,
    on_progress: Progress | None, before: int, total: int,
) -> list[str]:  # fmt: skip
    """The base's answers to some of the questions, "" for one that did not end by itself."""
    prompts = [loaded.prompt(records.messages({**row, "assistant": ""}), settings)[0] for row in rows]
    with loaded.base_only():
        advance = on_progress and (lambda done, _: on_progress(before + done, total))
        answers = loaded.generate(prompts, settings, config.eval.batch_size, advance)
    return [one.text.strip() if one.stopped else "" for one in answers]


def make(
    rows: list[Row], train: TokenisedRows, encoder: Encoder, config: Config, system: str | None
) -> tuple[Rehearsal, TokenisedRows]:
    """Encodes the answered rows; returns them, and the task's rows with them behind. Raises ModelError."""
    ledger, features = encode(rows, encoder, system, "train.rehearsal")
    joined = train.joined(features)
    losses = loss_counts(joined, causal=encoder.kind == "causal")
    return Rehearsal(rows, features, ledger, losses, config.train.rehearsal.share, config.train.seed), joined


def encode(rows: list[Row], encoder: Encoder, system: str | None, section: str) -> tuple[RunLedger, list[Feature]]:
    """Encodes answered rows for a section of the config.

    Every other row has the task's shared system text, as `infer` sends it. A row without an answer, or too long for
    `model.max_seq_len`, is named in the ledger. Raises ModelError if no row is left.
    """
    ledger, features = RunLedger(), list[Feature]()
    for row in rows:
        shared = {"system": system} if system and len(features) % 2 == 0 else {}
        encoded = encoder.encode({**shared, **row})
        if not row["assistant"]:
            encoded = Encoded(row["id"], [], [], dropped=INCOMPLETE)
        elif not encoded.fits:
            encoded = replace(encoded, dropped=OVER_LENGTH)
        ledger.add(encoded)
        if encoded.dropped is None:
            features.append({"id": row["id"], "input_ids": encoded.input_ids, "labels": encoded.labels})
    if not features:
        off = f"{section}.{'strength=0' if section == 'train.ewc' else 'rows=off'}"
        reasons = "; ".join(f"{len(ids)} rows: {reason}" for reason, ids in ledger.dropped.items())
        raise ModelError(
            f"there is no general answer for {section}: {reasons}",
            where=f"{section}.rows",
            fix=f"--set {off}, or questions with answers of your own: --set {section}.path=FILE",
        )
    return ledger, features


def with_rows(config: Config, rows: int) -> Config:
    """The config with the resolved number of rehearsal questions, 0 for `off`."""
    section = config.train.rehearsal.model_copy(update={"rows": rows or "off"})
    return config.model_copy(update={"train": config.train.model_copy(update={"rehearsal": section})})


def rehearse(
    job: Job, loaded: LoadedModel, run: Run, root: Path, report: Report | None
) -> tuple[Job, Rehearsal | None, TokenisedRows]:
    """Asks the base, encodes its answers; returns them, the rows to train on with them behind, and the job with the
    setting and the ledger that follow. The job is without rehearsal where `auto` finds that the base completes too few.
    """
    auto = job.unresolved.rehearsal.rows == "auto"
    answered = _base_answers(job, job.questions, loaded, root, report, auto=auto)
    rehearsed: Rehearsal | None = None
    complete = sum(bool(row["assistant"]) for row in answered)
    if auto and complete < MIN_COMPLETE:
        log.info("no rehearsal: the base ended only %d of %d answers by itself", complete, len(answered))
        job = replace(job, config=with_rows(job.config, 0), questions=[])
        rows = job.rows.train
    else:
        rehearsed, rows = make(answered, job.rows.train, job.encoder, job.config, job.rows.system)
        ledger = rehearsed.ledger
        job = replace(job, rows=replace(job.rows, ledgers={**job.rows.ledgers, "rehearsal": ledger}))
        log.info("rehearsal: %d of %d general questions, with answers of the base", ledger.rows_trained, len(answered))
    if distributed.rank() == 0:
        job.write_settings(run.folder)
        files.write_json(run.folder / "ledger.json", job.rows.ledger())
    return job, rehearsed, rows


def _base_answers(
    job: Job, questions: list[dict[str, Any]], loaded: LoadedModel, root: Path, report: Report | None, *, auto: bool
) -> list[dict[str, Any]]:
    """The questions with the base's answers, which the first process asks for."""
    from sft.model.adapters import has_prefix
    from sft.training.loggers import SECONDS_PER_LINE

    last_line = time.monotonic()

    def on_progress(done: float, total: int) -> None:
        nonlocal last_line
        line = f"the base answers general questions, {done:.0f} of {total}"
        if report is not None:
            report(int(done), total, line)
        elif time.monotonic() - last_line >= SECONDS_PER_LINE:
            last_line = time.monotonic()
            log.info(line)

    def ask() -> list[dict[str, Any]]:
        weights = job.files.fingerprint()
        with loaded.base_only() if has_prefix(loaded.model) else contextlib.nullcontext():  # new LoRA changes nothing
            return answer(questions, loaded, weights, job.config, root, auto=auto, on_progress=on_progress)

    return distributed.on_rank0(ask, together=shard.is_sharded(loaded.model))


def consolidate(
    job: Job, loaded: LoadedModel, step: StepConfig, opened: OpenRun, root: Path, report: Report | None
) -> tuple[Job, Consolidation]:
    """Elastic weight consolidation of the base that is loaded, and the job with its ledger.

    A new run estimates the Fisher information and stores it, with its rows, in outputs/<run>/ewc; a resumed one reads
    it there. Raises ModelError, RunError.
    """
    from safetensors.torch import load_file, save_file

    from sft.step.ewc import Consolidation, squared_gradients

    folder, model = opened.run.folder / "ewc", loaded.model
    path, rows_path = folder / "fisher.safetensors", folder / "rows.json"
    if opened.checkpoint is not None:
        if problem := distributed.on_rank0(lambda: files.manifest_problem(folder)):
            what = f"the Fisher information of this run cannot be used: {problem}"
            raise RunError(what, where=str(folder), fix="restore it, or start a new run: --resume never")
        rows = files.read_json(rows_path)["rows"]
    else:
        with step.forward_context():
            rows = _base_answers(job, job.general, loaded, root, report, auto=False)
    ledger, features = encode(rows, job.encoder, job.rows.system, "train.ewc")
    if opened.checkpoint is not None:
        fisher = load_file(path, device=str(next(model.parameters()).device))
    else:
        fisher, labels = squared_gradients(model, features[distributed.rank() :: distributed.world()], step)
        labels = sum(distributed.all_gather(labels))
        for squares in fisher.values():
            distributed.all_reduce(squares).div_(max(1, labels))

        def store() -> None:
            with files.atomic_folder(folder) as staged:
                files.put(staged / path.name, partial(save_file, fisher))
                files.write_json(staged / rows_path.name, {"rows": rows})
                files.write_manifest(staged)

        distributed.on_rank0(store)
        log.info("ewc: Fisher information of %d answers, %d tokens", len(features), labels)
    job = replace(job, rows=replace(job.rows, ledgers={**job.rows.ledgers, "ewc": ledger}))
    if distributed.rank() == 0:
        files.write_json(opened.run.folder / "ledger.json", job.rows.ledger())
    section, rate = job.config.train.ewc, float(job.config.train.learning_rate)
    cost = section.strength / 2 * rate**2 * sum(float(values.sum()) for values in fisher.values())
    if cost > 1 and "sgd" not in job.config.train.optim:
        log.warning(
            "train.ewc.strength is %g: a step of the rate %g in every weight costs %.2g nats, so the weights will not"
            " settle; fix: a lower rate, or --set train.ewc.strength=%.1g",
            section.strength, rate, cost, section.strength / cost / 10,
        )  # fmt: skip
    return job, Consolidation.around(model, fisher, job.config.train.ewc.strength)
