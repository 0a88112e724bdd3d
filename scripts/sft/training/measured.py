"""What a rehearsal and a finished run tell the planner: memory on a GPU, speed on any device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft import runs
from sft.errors import SftError
from sft.memory import estimate, plan, shapes
from sft.memory.devices import Device
from sft.model.kernels import PLAIN, kernels_of
from sft.training import distributed
from sft.training.preparation import Job
from sft.training.rehearsal import is_checkpointing
from sft.training.trainer import WindowTrainer

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "liger_kernel")
ENOUGH = 10.0  # seconds of steps: a shorter run's speed is that of its first steps
GIB = 2.0**30
log = logging.getLogger("sft.training")


def record_run(job: Job, trainer: WindowTrainer, summary: Mapping[str, Any], root: Path) -> None:
    """Keeps a finished run's tokens/s a device and, on a GPU, the highest tensor bytes since its rehearsal.

    summary: see `finish.summary`. On the CPU no memory is kept: what a process holds there says nothing of tensors.
    """
    if summary["seconds"] < ENOUGH or not summary["tokens"]:
        return
    settings = settled(job, trainer.asked_budget[0], is_checkpointing(trainer.model))
    train = job.config.train.model_copy(update=settings)
    peaks: dict[str, float] = {}
    if job.device.device == "cuda":
        import torch

        peaks["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        peaks["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if kernels_of(trainer.model) == PLAIN and (made := planned(job, settings, root)):
            peaks["planned_gib"] = max(phase.allocated for phase in made.phases.values())
    labelled = summary["labelled_tokens"] / summary["tokens"]
    record(
        job,
        root,
        "run",
        trainer.asked_budget[0],
        work=operations(job, train, labelled=labelled),
        tokens_per_second=summary["tokens_per_second"] / distributed.world(),
        **peaks,
    )


def settled(job: Job, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """What of `train` stands only when the run does. tokens: of a micro-batch."""
    rows = max(1, tokens // job.config.model.max_seq_len)
    return {
        "micro_batch_tokens": tokens,
        "batch_size": rows,
        "grad_accum": "auto",
        "gradient_checkpointing": checkpointing,
    }


def record(job: Job, root: Path, stage: str, tokens: int, *, work: float | None, **measured: Any) -> None:
    """Adds a record of this job's model on this device. tokens: of a micro-batch. work: operations a token."""
    entry = plan.Record(
        gpu="cpu" if job.device.device == "cpu" else job.device.name,
        family=str(job.files.config.get("model_type", "")),
        model=job.files.name,
        mode=job.config.tuning.mode,
        micro_batch_tokens=tokens,
        flops_per_token=work,
        stage=stage,
        versions=versions(),
        **measured,
    )
    plan.record_calibration(root, entry)


def planned(job: Job, settings: Mapping[str, Any], root: Path | None) -> plan.Plan | None:
    """The plan of this job at these settings of `train`; None where the planner cannot make one."""
    config = job.config.model_copy(update={"train": job.config.train.model_copy(update=dict(settings))})
    device = Device("cuda", job.device.name, job.device.total_bytes / GIB)
    try:
        return plan.make_plan(config, job.files.config, device, root=root, fix=False)
    except SftError as error:
        log.debug("no plan beside what was measured: %s", error)
        return None


def operations(job: Job, train: Any, *, labelled: float = 1.0) -> float | None:
    """Operations a token of this job by formula; None where its shapes cannot be counted."""
    rows = job.rows.train
    lengths = rows.lengths() if hasattr(rows, "lengths") else [len(row["input_ids"]) for row in rows]
    try:
        counted = shapes.count(job.files.config, job.config.tuning, name=job.files.name)
    except SftError as error:
        log.debug("the speed is kept without operations: %s", error)
        return None
    mean = sum(int(length) for length in lengths) / max(1, len(lengths))
    return estimate.operations(counted, job.config.tuning, train, length=mean, labelled=labelled)


def versions() -> dict[str, str]:
    """Of the libraries that memory and speed depend on."""
    return runs.versions(LIBRARIES)
