"""The micro-batch of a run: given, kept from a checkpoint, kept from an earlier rehearsal, or rehearsed now."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft import files
from sft.config.schema import TrainSection
from sft.errors import SftError
from sft.generation import engine
from sft.memory.probe import CudaGauge, Gauge
from sft.model import kernels
from sft.runs import Run
from sft.step.step import StepConfig
from sft.training import checkpoint as checkpoints
from sft.training import checkpoint as weights
from sft.training import distributed, measured, rehearsal
from sft.training.preparation import Job
from sft.training.rehearsal import Rehearsed, Scene

CACHE = ".cache/rehearsal"  # under the project's root
log = logging.getLogger("sft.training")


@dataclass(frozen=True)
class Settled:
    """tokens: of a micro-batch. checkpointing: whether activations are recomputed. why: where they come from."""

    tokens: int
    checkpointing: bool
    why: str
    eval_tokens: int | None = None


def is_open(asked: TrainSection) -> bool:
    """Whether the config leaves the micro-batch to be measured."""
    return (asked.batch_size, asked.grad_accum, asked.micro_batch_tokens) == ("auto", "auto", "auto")


def settle(
    job: Job, model: Any, step_config: StepConfig, run: Run, checkpoint: Path | None, root: Path
) -> Settled | None:
    """What the run computes at once, rehearsed on a GPU; None on the CPU, where the resolved config stays.

    A run that is taken up keeps what its checkpoint has, so that it goes on bit for bit. Otherwise a rehearsal is kept
    by GPU, model, lengths, adapter and versions, and not done again. Raises EnvironmentProblem where no row fits.
    """
    if job.device.device != "cuda":
        return None
    if checkpoint is not None:
        session = checkpoints.read_state(checkpoint, checkpoints.SESSION)
        checkpointing = bool(session.get("checkpointing", rehearsal.is_checkpointing(model)))
        rehearsal.set_checkpointing(model, checkpointing)
        return Settled(int(session["asked_budget"][0]), checkpointing, "as in the checkpoint")
    path = root / CACHE / f"{key(job)}.json"
    found = _kept(path)
    if found is None:
        gauge = CudaGauge(torch.device("cuda", torch.cuda.current_device()))
        found = rehearsal.rehearse(scene(job, model, step_config, run, gauge))
        if distributed.rank() == 0:
            _remember(root, path, job, found)
        log.info("rehearsed: %s", found.said)
    else:
        log.info("rehearsed before on this GPU: %s", found.said)
    rehearsal.set_checkpointing(model, found.checkpointing)
    tokens = -distributed.largest(-found.tokens)  # the least over ranks
    recomputed = "with" if found.checkpointing else "without"
    why = f"rehearsed, {recomputed} gradient checkpointing"
    return Settled(tokens, found.checkpointing, why, found.evaluating)


def scene(job: Job, model: Any, step_config: StepConfig, run: Run, gauge: Gauge) -> Scene:
    """The run's own longest rows, questions and save."""
    train, optim = job.config.train, job.config.train.optim
    rows = job.rows.train
    lengths = [int(length) for length in rows.lengths()] if hasattr(rows, "lengths") else _lengths(rows)
    return Scene(
        model=model,
        step_config=step_config,
        rows=rows,
        lengths=lengths,
        validation=job.rows.validation,
        most_rows=-(-int(train.effective_batch) // distributed.world()),
        gauge=gauge,
        fixed=None if is_open(job.asked) else int(train.micro_batch_tokens),
        free=job.asked.gradient_checkpointing == "auto",
        state_bytes=0 if optim.startswith("paged") else 2 if "8bit" in optim else 8,
        answer=_answering(job, model) if job.rows.questions else None,
        save=_saving(model, run) if weights.is_adapter(model) and distributed.rank() == 0 else None,
    )


def key(job: Job) -> str:
    """What a rehearsal depends on, as a short hash."""
    train, tuning = job.config.train, job.config.tuning
    depends = {
        "gpu": [job.device.name, job.device.total_bytes],
        "model": [job.files.name, job.files.fingerprint()],
        "tuning": tuning.model_dump(),
        "lengths": [job.config.model.max_seq_len, job.rows.longest],
        "step": [
            train.effective_batch,
            distributed.world(),
            train.logits,
            train.logits_tile,
            train.optim,
            train.bf16,
            train.activation_offload,
            job.asked.kernels,
        ],
        "asked": [job.asked.gradient_checkpointing, *(train.micro_batch_tokens,) * (not is_open(job.asked))],
        "answers": [job.config.eval.batch_size, job.config.generation.max_new_tokens, len(job.rows.questions)],
        "versions": measured.versions(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _kept(path: Path) -> Rehearsed | None:
    try:
        return Rehearsed.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _remember(root: Path, path: Path, job: Job, found: Rehearsed) -> None:
    """Keeps it for the next start, shows it beside the plan, and tells the planner what was measured."""
    training, now = found.stages[0], measured.settled(job, found.tokens, found.checkpointing)
    made = measured.planned(job, now, None)
    planned = None if made is None or job.asked.kernels not in ("auto", kernels.PLAIN) else made.estimate.allocated
    allocated = training.allocated_bytes / 2**30
    log.info("a step's tensors: %.2f GiB at most%s", allocated, f", planned {planned:.2f}" if planned else "")
    measured.record(
        job,
        root,
        "rehearsal",
        found.tokens,
        work=measured.operations(job, job.config.train.model_copy(update=now)),
        allocated_gib=allocated,
        reserved_gib=training.reserved_bytes / 2**30,
        planned_gib=planned,
        tokens_per_second=found.tokens_per_second,
    )
    try:
        files.write_json(path, found.to_json())
    except (OSError, SftError) as error:
        log.warning("the rehearsal could not be kept for the next start: %s", error)


def _answering(job: Job, model: Any) -> Callable[[], object]:
    """Answers at their full length without making each token: prompts as long as prompt and answer will be."""
    section = job.config.generation
    batch = job.config.eval.batch_size
    longest = sorted((question.ids for question in job.rows.questions), key=len)[-batch:]
    prompts = [list(ids) + [ids[-1]] * section.max_new_tokens for ids in longest if ids]
    short = section.model_copy(update={"max_new_tokens": 2})

    def answer() -> object:
        stops = job.encoder.stops
        return engine.generate(model, job.tokenizer, prompts, short, stops, batch_size=batch, kind=job.files.kind)

    return answer


def _saving(model: Any, run: Run) -> Callable[[], object]:
    def save() -> None:
        folder = run.folder / ".rehearsal"
        folder.mkdir(exist_ok=True)
        try:
            weights.save_weights(model, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return save


def _lengths(rows: Any) -> list[int]:
    return [len(row["input_ids"]) for row in rows]
