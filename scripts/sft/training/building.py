"""Puts a run's parts together: model, step config, checkpoints, what watches and what writes down."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import files, runs
from sft.errors import EnvironmentProblem
from sft.generation.engine import max_prompt_tokens, truncate_prompt
from sft.generation.evaluate import questions
from sft.model import kernels
from sft.runs import OpenRun, Run
from sft.step.step import StepConfig, make_step_config, use_kernels
from sft.training import budget, checkpoint, distributed, loggers, model
from sft.training.answers import Answers
from sft.training.checkpoint import CheckpointManager
from sft.training.flow import Flow
from sft.training.overview import Narrator, Report
from sft.training.preparation import Job
from sft.training.signals import SignalHandler
from sft.training.trainer import WindowTrainer

log = logging.getLogger("sft.training")


@contextmanager
def hold(job: Job, opened: OpenRun, allowed: list[str]) -> Iterator[list[str]]:
    """Makes the run's folders, takes its lock for the time of the block, checks the stamp, and writes the resolved
    config, stamp and ledger. Yields the changed settings that were accepted. Raises RunError.
    """
    with contextlib.ExitStack() as held:
        yield distributed.on_rank0(lambda: _begin(job, opened, allowed, held))


def _begin(job: Job, opened: OpenRun, allowed: list[str], held: contextlib.ExitStack) -> list[str]:
    run = opened.run
    runs.make_folders(run)
    held.enter_context(files.lock(run.folder / runs.LOCK, f"the run {run.name}"))
    files.sweep(run.folder)
    files.sweep(run.adapter_dir.parent, run.adapter_dir.name)
    accepted = checkpoint.check_fingerprint(opened.checkpoint, job.stamp(), allowed) if opened.checkpoint else []
    beside(job)(run.folder)
    files.write_json(run.folder / "ledger.json", job.rows.ledger())
    return accepted


def build(job: Job, opened: OpenRun, root: Path, report: Report | None) -> WindowTrainer:
    """Loads the weights and makes the trainer. report: see `Narrator`. Raises ModelError, EnvironmentProblem."""
    config, run = job.config, opened.run
    made = model.build(config, job.files, job.backend.name, device=job.device.device)
    given = (job.asked.batch_size, job.asked.grad_accum) != ("auto", "auto")
    rows = int(config.train.batch_size) if given else None
    step_config = make_step_config(config.train, made, job.files.kind, job.device.device, max_rows=rows)
    use_kernels(made, job.asked.kernels, step_config, backend=job.backend.name)
    job, step_config = _with_budget(_with_questions(job, made, root), made, step_config, opened, root)
    config = job.config
    answers = Answers(config, root, job.tokenizer, job.encoder, job.rows.questions, job.files.kind)
    step = runs.step_of(opened.checkpoint) if opened.checkpoint else 0
    trainer = WindowTrainer(
        made,
        job.plan.arguments(config.train, run, device=job.device.device),
        job.rows.train,
        job.rows.validation,
        effective_batch=int(config.train.effective_batch),
        step_config=step_config,
        keeper=CheckpointManager(run, config.train.save_total_limit, beside(job)),
        flow=Flow(job.plan, SignalHandler(run.folder, distributed.largest), config.train.early_stopping),
        answers=answers if job.rows.questions else None,
        on_nan=config.train.on_nan,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise EnvironmentProblem(
            "sharded training (FSDP, DeepSpeed) is not supported: its checkpoints could not be resumed exactly",
            where="the accelerate config",
            fix="accelerate launch --config_file env/accelerate_ddp_2.yaml scripts/train.py",
        )
    if distributed.rank() == 0:
        trainer.add_callback(_logbook(job, run, step, answers))
        trainer.add_callback(Narrator(report))
    return trainer


def _with_questions(job: Job, made: Any, root: Path) -> Job:
    """The job with its sample of validation rows asked as `eval` asks them (`eval.shots`, `eval.turns`)."""
    if not job.rows.asked:
        return job
    room = max_prompt_tokens(made, job.config.generation, job.files.kind)
    asked = questions(lambda row: truncate_prompt(job.encoder, row, room), job.rows.asked, job.config, root)
    return replace(job, rows=replace(job.rows, questions=asked))


def _with_budget(job: Job, made: Any, step_config: StepConfig, opened: OpenRun, root: Path) -> tuple[Job, StepConfig]:
    """The job with the measured budget in its config and in the run's folder, and the step's config with it."""
    settled = budget.settle(job, made, step_config, opened.run, opened.checkpoint, root)
    if settled is None:
        return job, step_config
    tokens = settled.tokens
    step_config = replace(step_config, micro_batch_tokens=tokens, eval_tokens=settled.eval_tokens)
    effective, length = int(job.config.train.effective_batch), job.config.model.max_seq_len
    rows = min(effective, max(1, tokens // length))
    now: dict[str, Any] = {"micro_batch_tokens": tokens, "gradient_checkpointing": settled.checkpointing}
    now["kernels"] = kernels.kernels_of(made)
    if budget.is_open(job.asked):
        now |= {"batch_size": rows, "grad_accum": -(-effective // rows)}
    train = job.config.train.model_copy(update=now)
    job = replace(job, config=job.config.model_copy(update={"train": train}))
    if distributed.rank() == 0:
        beside(job)(opened.run.folder)
        log.info("micro-batches of at most %d tokens (%s)", tokens, settled.why)
    return job, step_config


def beside(job: Job) -> Callable[[Path], None]:
    """What stands beside weights wherever they are kept: the resolved config and the stamp."""

    def write(folder: Path) -> None:
        runs.write_resolved(folder, job.config)
        checkpoint.write_fingerprint(folder, job.stamp())

    return write


def _logbook(job: Job, run: Run, step: int, answers: Answers) -> loggers.Logbook:
    section = job.config.logging
    books: list[object] = [loggers.JsonLines(run.folder / "log.jsonl", step)]
    if section.backend == "tensorboard":
        try:
            books.append(loggers.Board(run.tb_dir, step))
        except OSError as error:
            log.warning("no TensorBoard curves (%s); log.jsonl has the numbers", error)
    gauges = loggers.gpu_gauges if section.gpu_stats else dict
    return loggers.Logbook(books, gauges, lambda: answers.samples)
