"""What a person is told before a run begins, while it goes on and when it has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.config import load
from sft.runs import OpenRun, Run
from sft.training.preparation import Job

log = logging.getLogger("sft.training")
Report = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them
_TRAIN = (
    "epochs learning_rate lr_scheduler_type effective_batch batch_size grad_accum micro_batch_tokens bf16 fp16 optim"
    " gradient_checkpointing kernels eval_strategy save_strategy"
).split()


def before(job: Job, opened: OpenRun) -> list[str]:
    """The run, the model, the rows, the steps, and each setting with the reason of those that were settled for you."""
    config, rows, plan = job.config, job.rows, job.plan
    tuning = config.tuning
    dated = f", dated {job.template.day}" if job.template.prints_date else ""
    adapter = f", LoRA r {tuning.lora.r} alpha {tuning.lora.alpha}" if tuning.mode != "full" else ""
    lines = [
        opened.message,
        f"model   {job.files.name} ({job.files.parameters / 1e6:,.1f}M parameters, {job.files.kind}),"
        f" {tuning.mode} with {job.backend.name}{adapter}, on {job.device.name or job.device.device}",
        f"rows    {len(rows.train):,} to train on, {len(rows.validation):,} to evaluate on ({rows.stage} rows,"
        f" template {job.template.name}{dated})",
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


class Narrator(TrainerCallback):  # type: ignore[misc]
    """Tells `report` of every step, for a bar; without one (no terminal), logs a line at each log interval."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self._shown = ""
        self._began: tuple[float, int] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._began is None:
            self._began = (time.monotonic(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.report is not None and state.is_world_process_zero:
            self.report(state.global_step, state.max_steps, self._shown)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            log.info("step %d: %s", state.global_step, evaluation_line(logs))
        if "loss" not in logs:
            return
        self._shown = f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tok/s"
        if self.report is not None:
            self.report(state.global_step, state.max_steps, self._shown)
        else:
            told = (state.global_step, state.max_steps, self._shown, logs["learning_rate"], self._left(state))
            log.info("step %d/%d  %s  lr %.2e%s", *told)

    def _left(self, state: TrainerState) -> str:
        if self._began is None or state.global_step <= self._began[1]:
            return ""
        pace = (time.monotonic() - self._began[0]) / (state.global_step - self._began[1])
        return f"  {clock(pace * (state.max_steps - state.global_step))} left"


def evaluation_line(logs: Mapping[str, Any]) -> str:
    """An evaluation's metrics on one line, the loss first."""
    shown = {key[5:]: value for key, value in logs.items() if key.startswith("eval_") and key != "eval_seconds"}
    return "eval " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items())


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
    lines.append(f"written to {load.display_path(Path(summary['output']), root)}")
    return lines + [f"next:   {step}" for step in _next(job)]


def _next(job: Job) -> Sequence[str]:
    steps = ["make eval    (scores it on the validation rows; make eval-test for the test rows)"]
    steps.append("make infer   (talk to it)")
    if job.config.tuning.mode != "full" and not job.config.train.merge_at_end:
        steps.append("make merge   (one model, without the adapter)")
    return steps


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
