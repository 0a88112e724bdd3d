"""What a person is told before a run begins and when it has ended, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.config import paths
from sft.runs import OpenRun, Run
from sft.training.narrator import clock
from sft.training.preparation import Job

_TRAIN = (
    "epochs learning_rate lr_scheduler_type effective_batch batch_size grad_accum micro_batch_tokens bf16 fp16 optim"
    " gradient_checkpointing kernels eval_strategy save_strategy"
).split()


def before(job: Job, opened: OpenRun) -> list[str]:
    """The run, the model, the rows, the steps, and each setting with the reason of those that were settled for you."""
    config, rows, plan = job.config, job.rows, job.plan
    tuning = config.tuning
    adapter = f", LoRA r {tuning.lora.r} alpha {tuning.lora.alpha}" if tuning.mode != "full" else ""
    lines = [
        opened.said,
        f"model   {job.files.name} ({job.files.parameters / 1e6:,.1f}M parameters, {job.files.kind}),"
        f" {tuning.mode} with {job.backend.name}{adapter}, on {job.device.name or job.device.device}",
        f"rows    {len(rows.train):,} to train on, {len(rows.validation):,} to evaluate on ({rows.stage} rows,"
        f" template {job.template.name})",
        *(f"        {split}: {line}" for split, told in rows.ledgers.items() for line in told.sentences()),
        f"steps   {plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch, {plan.warmup_steps} of warm-up),"
        f" seed {config.train.seed}",
        "settings",
    ]
    for name in _TRAIN:
        reason = job.reasons.get(f"train.{name}")
        lines.append(f"  {name:<24}{getattr(config.train, name)!s:<14}" + (f"  {reason}" if reason else ""))
    return [line.rstrip() for line in lines] + [f"note: {note}" for note in plan.notes]


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
        "steps": job.plan.total_steps,
        "train": job.config.train.model_dump(),
        "reasons": job.reasons,
    }


def after(job: Job, summary: dict[str, Any], run: Run, root: Path) -> list[str]:
    """What came of it and what to do next."""
    evaluated = "  ".join(f"{name} {value:.4f}" for name, value in summary["eval"].items())
    from_to = ""
    if summary["train_loss_first"] is not None:
        from_to = f", loss {summary['train_loss_first']:.4f} -> {summary['train_loss_last']:.4f}"
    lines = [
        f"{run.name} is finished: {summary['steps']:,} steps in {clock(summary['seconds'])}{from_to},"
        f" {summary['tokens_per_second']:,.0f} tokens/s, peak memory {summary['peak_memory_gib']:.2f} GiB",
    ]
    if summary["steps"] < summary["planned_steps"]:
        lines.append(f"stopped early, of {summary['planned_steps']:,} planned steps: evaluation no longer improved")
    if evaluated:
        chosen = "the best checkpoint" if summary["best_step"] else "the last evaluation"
        if lost := summary["best_lost"]:
            chosen = f"the best checkpoint (step {lost['step']}, {lost['value']:.4f}) was damaged; what is left"
        lines.append(f"{chosen} (step {summary['best_step'] or summary['steps']}): {evaluated}")
    lines.append(f"written to {paths.shown(Path(summary['output']), root)}")
    return lines + [f"next:   {step}" for step in _next(job)]


def _next(job: Job) -> Sequence[str]:
    steps = ["make eval    (scores it on the validation rows; make eval-test for the test rows)"]
    steps.append("make infer   (talk to it)")
    if job.config.tuning.mode != "full" and not job.config.train.merge_at_end:
        steps.append("make merge   (one model, without the adapter)")
    return steps
