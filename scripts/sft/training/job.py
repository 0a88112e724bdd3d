"""A training job: from a config to everything that the loop needs.

`prepare` reads, checks and resolves; it loads no weights. `hold_run` locks the run's folder. `make_loop` loads the
model and builds the loop. What the run leaves at its end is written by `result`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files, runs
from sft.config import auto
from sft.config.load import Loaded, resolve_path
from sft.config.schema import PREFERENCES, Config, TrainSection
from sft.data import shards, store
from sft.errors import ConfigError, DataError, EnvironmentProblem
from sft.model import backends, hardware, hub, shard
from sft.runs import OpenRun
from sft.training import distributed

if TYPE_CHECKING:
    from sft.chat.dataset import TokenisedRows
    from sft.generation.engine import LoadedModel
    from sft.model.backends import Backend
    from sft.model.files import ModelFiles
    from sft.training.loggers import Report
    from sft.training.loop import Answer, Feature, Schedule, TrainingLoop

# unsloth must be imported before transformers: `prepare` sees to that, and whatever imports transformers comes after it
log = logging.getLogger("sft.training")
ANSWER_METRICS = ("format_adherence", "stop_rate", "repetition", "empty_rate", "length_words", "length_tokens")
SHOWN = (
    "objective epochs learning_rate lr_scheduler_type effective_batch batch_size grad_accum micro_batch_tokens"
    " bf16 fp16 optim gradient_checkpointing kernels eval_strategy save_strategy"
).split()


@dataclass(frozen=True)
class Rows:
    """The rows of a run, tokenised and labelled, and what became of each row that was read.

    answer_rows: validation rows that are answered at each evaluation. hashes: SHA-256 of each file read. ledgers: one a
    split. system: the system text that every training row shares. longest: tokens of the longest training row. leaks:
    validation rows whose prompt also occurs in training.
    """

    stage: str
    train: TokenisedRows
    validation: Sequence[Feature]
    answer_rows: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    ledgers: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    longest: int = 0
    leaks: int = 0

    def ledger(self) -> dict[str, Any]:
        """outputs/<run>/ledger.json: rows read = rows trained on + rows named, in each split."""
        splits = {split: ledger.to_dict() for split, ledger in self.ledgers.items()}
        return {"stage": self.stage, **splits, "validation_rows_given_away": self.leaks}


@dataclass(frozen=True)
class Job:
    """A run that is ready to begin: the resolved config, its rows and its schedule.

    unresolved: the section `train` before its `auto` values were resolved. reasons: of each resolved value. questions:
    to rehearse; those that have no answer yet are put to the base. general: questions of `train.ewc`. longest: tokens
    of the longest row, rehearsed ones included. extra_tokens: that rehearsal adds to the run, about. adapter_digest:
    SHA-256 of the adapter to go on from.
    """

    config: Config
    unresolved: TrainSection
    reasons: dict[str, str]
    files: ModelFiles
    backend: Backend
    device: hardware.Hardware
    encoder: Any
    rows: Rows
    schedule: Schedule
    questions: list[dict[str, Any]] = field(default_factory=list)
    general: list[dict[str, Any]] = field(default_factory=list)
    longest: int = 0
    extra_tokens: int = 0
    adapter_digest: str | None = None

    def fingerprint(self) -> dict[str, Any]:
        """The settings that checkpoints of this run depend on; see `checkpoint.check_fingerprint`."""
        train, tuning = self.config.train, self.config.tuning
        names = (
            "seed effective_batch learning_rate lr_scheduler_type min_lr_ratio decay_ratio weight_decay optim"
            " max_grad_norm label_smoothing z_loss labels objective normalize neftune_alpha"
        ).split()
        return {
            "backend": self.backend.name,
            "base_model": self.files.name,
            "revision": self.files.revision,
            "weights": self.files.fingerprint(),
            "kind": self.files.kind,
            "mode": tuning.mode,
            "lora": tuning.lora.model_dump() if tuning.mode != "full" else None,
            "adapter": f"prefix of {tuning.prefix_tokens}" if tuning.adapter == "prefix" else "lora",
            "adapter_path": self.adapter_digest,
            "freeze": tuning.freeze,
            "precision": "bf16" if train.bf16 else "fp16" if train.fp16 else "fp32",
            "template": self.encoder.template.digest,
            "data": self.rows.hashes,
            "weight_field": self.config.data.weight_field,
            "max_seq_len": self.config.model.max_seq_len,
            "world_size": distributed.world(),
            "sharding": distributed.sharding_name(),
            "total_steps": self.schedule.total_steps,
            "warmup_steps": self.schedule.warmup_steps,
            "rehearsal": train.rehearsal.model_dump() if self.questions else "off",
            "ewc": train.ewc.model_dump() if train.ewc.strength else "off",
            "preference": train.preference.model_dump() if train.objective in PREFERENCES else None,
            **{name: getattr(train, name) for name in names},
        }

    def write_settings(self, folder: Path) -> None:
        """Writes the resolved config and the fingerprint, which are stored wherever weights are."""
        runs.write_resolved(folder, self.config)
        files.write_json(folder / runs.FINGERPRINT, self.fingerprint())


# -- before the weights are loaded -------------------------------------------------------------------------------------


def prepare(
    loaded: Loaded,
    root: Path,
    on_progress: Callable[[int, int], None] | None = None,
    checkpoint: Path | None = None,
) -> Job:
    """Reads the rows and resolves the config; loads no weights, writes only the cache. Raises SftError.

    checkpoint: the one that training resumes from; its date is used again in templates that print the date.
    """
    from sft.chat.template import fix_date

    config = fix_date(loaded.config, runs.run_of_adapter(checkpoint) if checkpoint else None)
    distributed.on_rank0(lambda: str(hub.find(config.model, root, weights=True).path))  # downloads or imports it once
    model_files = hub.find(config.model, root, weights=True)
    model_files.require_positions(config.model.max_seq_len)
    backend = backends.prepare(config.tuning, kind=model_files.kind)

    from sft.chat.dataset import FOLDER
    from sft.generation.encoder import load_encoder
    from sft.metrics.scoring import check_names
    from sft.model.tokenizer import round_trip_problem
    from sft.training import rehearsal
    from sft.training.checkpoint import REHEARSAL
    from sft.training.loggers import require_installed

    check_names(config.eval.metrics)
    require_installed(config.logging.backends)
    config, adapter_digest = _find_adapter(config, root)
    encoder = load_encoder(config, root, files=model_files)
    if problem := round_trip_problem(encoder.tokenizer):
        log.warning(problem)
    answered = config.eval.train_sample if config.train.eval_strategy != "no" else 0
    stage = store.resolve_stage(config.data, root)
    if stage.name != "given":  # so that eval reads the same rows, also where styled ones are written later
        config = config.model_copy(update={"data": config.data.model_copy(update={"stage": stage.name})})
    rows = read_rows(stage, encoder, answered=answered, cache=root / FOLDER, on_progress=on_progress)
    device = hardware.choose(config.model.device_map)
    facts = auto.Facts(
        device=device.device,
        capability=device.capability,
        parameters=model_files.parameters,
        train_rows=len(rows.train),
        seq2seq=model_files.kind == "seq2seq",
        bf16_supported=device.bf16,
        sharded=distributed.sharding() is not None,
    )
    resolved = auto.resolve(config, facts)
    if facts.sharded:
        from sft.step.optimizer import TORCH

        shard.require_shardable(resolved.config, backend.name, TORCH, deepspeed=bool(distributed.zero_stage()))
    stored = files.read_json(checkpoint / REHEARSAL) if checkpoint else None
    answers = stage.val is None or not shards.has_tokens(stage.val)
    schedule = make_schedule(resolved.config, len(rows.train), validation=bool(rows.validation), answers=answers)
    section = config.train.rehearsal
    due = rows.ledgers["train"].labelled_tokens * section.share / (1 - section.share)
    due *= schedule.total_steps / schedule.steps_per_epoch
    if config.train.objective in PREFERENCES:
        section = section.model_copy(update={"rows": "off"})
    questions, reason = rehearsal.choose(section, rows.train, encoder, root, due, stored)
    ewc = config.train.ewc
    general = rehearsal.read_questions(ewc, root)[: ewc.rows] if ewc.strength and checkpoint is None else []
    longest, extra_tokens = rehearsal.sizes(questions, encoder, rows.system, due)
    return Job(
        config=rehearsal.with_rows(resolved.config, len(questions)),
        unresolved=config.train,
        reasons=resolved.reasons | ({"train.rehearsal.rows": reason} if reason else {}),
        files=model_files,
        backend=backend,
        device=device,
        encoder=encoder,
        rows=rows,
        schedule=schedule,
        questions=questions,
        general=general,
        longest=max(rows.longest, longest),
        extra_tokens=extra_tokens,
        adapter_digest=adapter_digest,
    )


def _find_adapter(config: Config, root: Path) -> tuple[Config, str | None]:
    """The config with the real folder of the adapter to go on from, which adapters/last is not, and its SHA-256."""
    from sft.model import adapters

    if config.tuning.adapter_path is None:
        return config, None
    folder = resolve_path(root, config.tuning.adapter_path).resolve()
    adapters.base_of(folder)
    tuning = config.tuning.model_copy(update={"adapter_path": str(folder)})
    return config.model_copy(update={"tuning": tuning}), files.sha256(folder / adapters.WEIGHTS)


def read_rows(
    stage: store.Stage,
    encoder: Any,
    *,
    answered: int,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """The training and validation rows, encoded or from `cache`. Raises DataError if none can be trained on.

    answered: validation rows to answer at each evaluation.
    """
    import numpy as np

    from sft.chat.dataset import RunLedger, TokenisedRows, Tokeniser
    from sft.data.rows import row_id
    from sft.generation.evaluate import answerable

    hashes = {path: shards.digest(path) for path in (stage.train, stage.val) if path is not None}
    tokenise = Tokeniser(encoder, cache)
    train = tokenise(stage.train, hashes[stage.train], on_progress)
    if not train.rows:
        raise train.ledger.no_rows_left(encoder.template.name)
    if encoder.weight_field and not train.ledger.rows_weighted:
        what = f"no training row of {stage.train.name} has the key {encoder.weight_field!r}"
        store_it = "a number under this key in its rows" if stage.name == "given" else "make process, which stores it"
        raise DataError(what, where="data.weight_field", fix=f"{store_it}; or --set data.weight_field=null")
    validation, validation_ledger, answer_rows = TokenisedRows(), RunLedger(), []
    if stage.val is not None:
        split = tokenise(stage.val, hashes[stage.val])
        validation, validation_ledger = split.rows, split.ledger
        dropped = {name for names in validation_ledger.dropped.values() for name in names}
        if answered and shards.has_tokens(stage.val):
            log.info("the validation rows are tokens: their loss is measured, and no answers are generated")
        elif answered:
            usable = (row for row in store.iter_rows(stage.val) if row_id(row) not in dropped and answerable(row))
            answer_rows = list(islice(usable, answered))
    if validation_ledger.rows_read and not validation:
        reason = validation_ledger.no_rows_left(encoder.template.name).what
        log.warning("no validation row can be used, so nothing is evaluated while training: %s", reason)
    leaks = int(np.isin(validation.prompt_ids(), train.rows.prompt_ids()).sum())
    if leaks:
        log.warning(
            "%d of %d validation prompts also occur in training; validation loss is optimistic", leaks, len(validation)
        )
    return Rows(
        stage=stage.name,
        train=train.rows,
        validation=validation,
        answer_rows=answer_rows,
        hashes={path.name: digest for path, digest in hashes.items()},
        ledgers={"train": train.ledger, "val": validation_ledger},
        system=train.system,
        longest=train.rows.longest(),
        leaks=leaks,
    )


def make_schedule(config: Config, rows: int, *, validation: bool, answers: bool = True) -> Schedule:
    """The schedule of a resolved config for `rows` training rows. answers: whether validation rows have texts to
    compare answers with. Raises ConfigError.
    """
    from sft.training.loop import Schedule

    train = config.train
    per_epoch = math.ceil(rows / int(train.effective_batch))
    total = train.max_steps or max(1, math.ceil(float(train.epochs) * per_epoch))
    evaluates = train.eval_strategy != "no" and validation
    if train.eval_strategy != "no" and not validation:
        log.info("no evaluation while training, as there are no validation rows: the last weights are the result")
    if train.early_stopping.enabled is True and not evaluates:
        raise ConfigError(
            "train.early_stopping needs an evaluation while training, and there is none",
            where="train.early_stopping.enabled",
            fix="--set train.eval_strategy=epoch with validation rows, or switch early stopping off",
        )
    warmup_steps = math.ceil(train.warmup_ratio * total) if train.warmup_steps is None else train.warmup_steps
    return Schedule(per_epoch, total, warmup_steps, _best_metric(config, answers) if evaluates else None)


def step_of_share(until: float | None, schedule: Schedule) -> int | None:
    """The step that `--until` means: a share of all steps below 1, else a step. Raises ConfigError below 0."""
    if until is None:
        return None
    if until <= 0:
        raise ConfigError(f"--until {until:g} is no step", where="--until", fix="a step (100) or a share (0.25)")
    return math.ceil(until * schedule.total_steps) if until < 1 else int(until)


def _best_metric(config: Config, answers: bool) -> str:
    """The metric that chooses the best checkpoint. Raises ConfigError if it is not measured while training."""
    from sft.metrics.scoring import check_names

    name = config.train.metric_for_best_model.removeprefix("eval_").removeprefix("eval/")
    known = ["loss", "perplexity", *check_names(config.eval.metrics), *ANSWER_METRICS]
    if config.train.objective in PREFERENCES:
        known = ["loss", "rewards/margins", "rewards/accuracies", *known[2:]]
    known += ["json_schema"] if config.eval.json_schema else []
    if name not in known:
        raise ConfigError(
            f"train.metric_for_best_model is {name!r}, which is not measured while training",
            where="train.metric_for_best_model",
            fix=f"one of {', '.join(known)}; or add {name} to eval.metrics",
        )
    gate = config.train.min_stop_rate
    generated = name not in {"loss", "perplexity"} and not name.startswith("rewards/")
    if (gate > 0 or generated) and (config.eval.train_sample == 0 or not answers):
        setting = f"min_stop_rate is {gate}" if gate > 0 else f"metric_for_best_model is {name!r}"
        if not answers:
            what = f"train.{setting}, but the validation rows are tokens, so no answers are generated"
            raise ConfigError(what, where="data.val_path", fix="name rows of texts: --set data.val_path=FILE")
        what = f"train.{setting}, but eval.train_sample is 0, so no answers are generated"
        raise ConfigError(what, where="eval.train_sample", fix="--set eval.train_sample=32")
    return name


def describe(job: Job, opened: OpenRun) -> list[str]:
    """What a user sees before training: the run, the model, the rows, the steps, the settings with their reasons."""
    from sft.model.tokenizer import NEW_TOKENS

    config, rows, schedule, tuning = job.config, job.rows, job.schedule, job.config.tuning
    template, new = job.encoder.template, job.files.config.get(NEW_TOKENS, [])
    dated = f", dated {template.day}" if template.prints_date else ""
    mode = {"lora": "LoRA", "qlora": "QLoRA (4-bit base)", "full": "all weights"}[tuning.mode]
    adapter = f", r {tuning.lora.r}, alpha {tuning.lora.alpha}" if tuning.mode != "full" else ""
    if tuning.adapter == "prefix":
        mode = f"prefix tuning ({'4-bit' if tuning.mode == 'qlora' else 'whole'} base)"
        adapter = f", {tuning.prefix_tokens} positions; rows are padded, not packed"
    adapter += f", going on from {tuning.adapter_path}" if tuning.adapter_path else ""
    library = ", unsloth" if job.backend.name == "unsloth" else ""
    if (world := distributed.world()) > 1:
        what = "optimizer states" if distributed.zero_stage() == 2 else "the weights"
        library += f", {world} processes that {f'share {what}' if distributed.sharding() else 'have a copy each'}"
    lines = [
        opened.message,
        f"model   {job.files.name} ({job.files.parameters / 1e6:,.1f}M parameters, {job.files.kind}),"
        f" {mode}{adapter}{library}, on {job.device.name}",
        f"rows    {len(rows.train):,} to train on, {len(rows.validation):,} to evaluate on ({rows.stage} rows,"
        f" template {template.name}{dated})",
        *(
            [f"tokens  {len(new)} of {len(config.model.add_tokens)} are new to the model"]
            if config.model.add_tokens
            else []
        ),
        *(f"        {split}: {line}" for split, ledger in rows.ledgers.items() for line in ledger.sentences()),
        f"steps   {schedule.total_steps:,} ({schedule.steps_per_epoch:,} an epoch, {schedule.warmup_steps} of warm-up),"
        f" seed {config.train.seed}",
        "settings",
    ]
    for name in SHOWN:
        reason = job.reasons.get(f"train.{name}", "")
        lines.append(f"  {name:<24}{getattr(config.train, name)!s:<14}  {reason}")
    if config.train.objective in PREFERENCES:
        preference = config.train.preference
        lines.append(
            f"  {'preference.beta':<24}{preference.beta!s:<14}  {job.reasons.get('train.preference.beta', '')}"
        )
    section = config.train.rehearsal
    lines.append(f"  {'rehearsal.rows':<24}{section.rows!s:<14}  {job.reasons.get('train.rehearsal.rows', '')}")
    if job.questions:
        lines.append(
            f"  {'rehearsal.share':<24}{section.share!s:<14}  of the loss tokens; questions: {section.path or 'ours'}"
        )
        new = sum("assistant" not in row for row in job.questions)
        before = f"before the first step, the base answers {new} general questions; " if new else ""
        lines.append(f"  rehearsal: {before}about {job.extra_tokens:,} tokens are added to the run")
    if strength := config.train.ewc.strength:
        lines.append(f"  {'ewc.strength':<24}{strength:<14g}  questions: {config.train.ewc.path or 'ours'}")
    return [line.rstrip() for line in lines]


def as_json(job: Job, opened: OpenRun) -> dict[str, Any]:
    """The same for --dry-run --json."""
    return {
        "run": opened.run.name,
        "checkpoint": str(opened.checkpoint) if opened.checkpoint else None,
        "model": job.files.name,
        "kind": job.files.kind,
        "backend": job.backend.name,
        "rows": len(job.rows.train),
        "validation_rows": len(job.rows.validation),
        "steps": job.schedule.total_steps,
        "rehearsal_tokens": job.extra_tokens,
        "train": job.config.train.model_dump(),
        "reasons": job.reasons,
    }


# -- the run -----------------------------------------------------------------------------------------------------------


@contextmanager
def hold_run(job: Job, opened: OpenRun, allowed: list[str]) -> Iterator[list[str]]:
    """Locks the run's folder for the time of the block, after checking the fingerprint, and writes its settings.

    Yields the changed settings that `allowed` accepts. Raises RunError.
    """
    from sft.training.checkpoint import check_fingerprint

    run = opened.run
    with contextlib.ExitStack() as stack:

        def begin() -> list[str]:
            files.make_folder(run.folder)
            stack.enter_context(files.lock(run.folder / runs.LOCK, f"the run {run.name}"))
            stack.enter_context(runs.reporting(run, job.files.name))
            files.sweep(run.folder)
            files.sweep(run.adapter_dir.parent, run.adapter_dir.name)
            accepted = check_fingerprint(opened.checkpoint, job.fingerprint(), allowed) if opened.checkpoint else []
            job.write_settings(run.folder)
            started = job.config.model_copy(update={"train": job.unresolved})
            runs.write_resolved(run.folder, started, runs.SETTINGS)
            files.write_json(run.folder / "ledger.json", job.rows.ledger())
            return accepted

        yield distributed.on_rank0(begin)


def make_loop(job: Job, opened: OpenRun, root: Path, report: Report | None) -> tuple[Job, TrainingLoop]:
    """Loads the model, chooses the micro-batch and builds the loop; the job's config has the chosen values.

    report: called with each step, for a progress bar. Raises ModelError, EnvironmentProblem.
    """
    from sft.generation.engine import LoadedModel
    from sft.model.kernels import apply_kernels
    from sft.step.step import make_step_config
    from sft.training import autobatch, rehearsal
    from sft.training.checkpoint import CheckpointManager
    from sft.training.loggers import Loggers, Trackers
    from sft.training.loop import TrainingLoop

    run, train, section, is_first = opened.run, job.config.train, job.config.logging, distributed.rank() == 0
    with distributed.in_turn():
        model = load_model(job.config, job.files, job.backend.name, device=job.device.device)
        distributed.shard_model(model, job.config)
    rows_given = (job.unresolved.batch_size, job.unresolved.grad_accum) != ("auto", "auto")
    step = make_step_config(
        train, model, job.files.kind, job.device.device, max_rows=int(train.batch_size) if rows_given else None
    )
    try:
        apply_kernels(model, train.kernels, device=job.device.device, autocast=step.autocast, backend=job.backend.name)
    except EnvironmentProblem as problem:
        if job.unresolved.kernels != "auto":
            raise
        log.warning("layers are computed as transformers does: %s", problem.what)
    answer, rehearsed, ewc, rows = None, None, None, job.rows.train
    loaded = LoadedModel(model, job.encoder.tokenizer, job.encoder, job.files.kind)
    if job.questions:
        if is_first:
            runs.update_status(run.folder, phase=f"the base answers {len(job.questions)} general questions")
        with step.forward_context():
            job, rehearsed, rows = rehearsal.rehearse(job, loaded, run, root, report)
    if train.ewc.strength:
        job, ewc = rehearsal.consolidate(job, loaded, step, opened, root, report)
    if job.rows.answer_rows:
        answer = sample_answers(loaded, job.rows.answer_rows, job.config, root)
    all_rows = replace(job, rows=replace(job.rows, train=rows))
    step, settings = autobatch.choose(all_rows, model, step, opened.checkpoint)
    if settings:
        job = replace(job, config=job.config.model_copy(update={"train": job.config.train.model_copy(update=settings)}))
        if is_first:
            job.write_settings(run.folder)
    trackers = [name for name in section.backends if name != "tensorboard"]
    loggers = Loggers(
        run.folder / "log.jsonl" if is_first else None,
        run.tb_dir if is_first and "tensorboard" in section.backends else None,
        trackers=Trackers(trackers, run, job.config) if trackers else None,
        after_step=runs.step_of(opened.checkpoint) if opened.checkpoint else 0,
        total_steps=job.schedule.total_steps,
        memory=section.gpu_stats,
        report=report if is_first else None,
    )
    loop = TrainingLoop(
        model,
        rows,
        job.rows.validation,
        config=job.config,
        schedule=job.schedule,
        step=step,
        checkpoints=CheckpointManager(run, train.save_total_limit, job.write_settings),
        rehearsal=rehearsed,
        ewc=ewc,
        answer=answer,
        loggers=loggers,
    )
    return job, loop


def load_model(config: Config, model_files: ModelFiles, backend: str, *, device: str) -> Any:
    """Loads the base and attaches what is trained, seeded. Raises ModelError, EnvironmentProblem.

    A frozen base has the type that is computed in, a full fine-tune fp32 weights: at a rate of 1e-5 an update is
    smaller than what bf16 can add to a weight (docs/decisions/0020-our-own-training-loop.md).
    """
    import torch
    from transformers import set_seed

    from sft.model import adapters
    from sft.model.load import load_base
    from sft.model.tokenizer import NEW_TOKENS
    from sft.step import attention
    from sft.step.step import compute_dtype

    train, tuning = config.train, config.tuning
    set_seed(train.seed)
    checkpointing = bool(train.gradient_checkpointing)
    dtype = torch.float32 if tuning.mode == "full" else compute_dtype(train)
    if backend == "unsloth":
        return backends.load_unsloth(model_files, config.model, tuning, dtype, gradient_checkpointing=checkpointing)
    implementation = attention.choose(device, model_files.config)
    stage = distributed.zero_stage()
    sharded = stage is None and distributed.sharding() is not None
    place = "cpu" if sharded or stage == 3 else device  # from where each layer moves to the GPU in parts
    model = load_base(
        model_files, config.model, tuning, dtype, device=place, train=True, attention=implementation, sharded=sharded
    )
    if tuning.mode == "full":
        vars(model.config).pop(NEW_TOKENS, None)  # all rows are trained
        adapters.freeze(model, tuning.freeze)
        adapters.set_checkpointing(model, checkpointing)
        return model
    return adapters.attach(model, tuning, gradient_checkpointing=checkpointing)


def sample_answers(loaded: LoadedModel, rows: list[dict[str, Any]], config: Config, root: Path) -> Answer:
    """Answers a fixed sample of validation rows at each evaluation, as `eval` does (`eval.shots`, `eval.turns`).

    Returns the metrics over all ranks, and the first `logging.samples` answers as Markdown.
    """
    from sft.generation import evaluate

    questions = evaluate.questions(lambda row: loaded.prompt(row, config.generation), rows, config, root)

    def answer(model: Any) -> tuple[dict[str, float], str]:
        together = shard.is_sharded(model)  # every rank then answers every question, as forward passes are collective
        mine = range(0 if together else distributed.rank(), len(questions), 1 if together else distributed.world())
        prompts = [questions[index].ids for index in mine]
        generated = replace(loaded, model=model).generate(prompts, config.generation, config.eval.batch_size)
        shares = distributed.all_gather(dict(zip(mine, generated, strict=True)))
        by_index = {index: answer for share in shares for index, answer in share.items()}
        answers = [by_index[index] for index in range(len(questions))]
        result = evaluate.score_answers(questions, answers, config, root)
        titles = {"question": "prompt", "answer": "prediction", "reference": "reference"}
        samples = (
            "\n\n".join(f"**{title}**\n\n> " + str(sample[key]).replace("\n", "\n> ") for title, key in titles.items())
            for sample in result.samples[: config.logging.samples]
        )
        return result.metrics, "\n\n---\n\n".join(samples)

    return answer


# -- after training ----------------------------------------------------------------------------------------------------
