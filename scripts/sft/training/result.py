"""What a run leaves: the adapter or the model with all that serving needs, the summary, and what the user reads."""

from __future__ import annotations

import logging
import resource
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files, runs
from sft.config.load import display_path
from sft.errors import Stopped
from sft.model import shard
from sft.runs import Run
from sft.training import distributed

if TYPE_CHECKING:
    from sft.training.job import Job
    from sft.training.loop import TrainingLoop

log = logging.getLogger("sft.training")


def require_finished(loop: TrainingLoop, continue_command: str) -> None:
    """Raises Stopped, with the command that continues the run, if it was stopped before its end."""
    code, progress = loop.signals.exit_code, loop.progress
    if code is not None and not loop.complete:
        what = f"Stopped at step {progress.global_step} of {progress.max_steps}, with a checkpoint."
        raise Stopped(what, exit_code=code, fix=continue_command)


def stopped_by_until(loop: TrainingLoop, run: Run) -> dict[str, Any] | None:
    """The steps and the last evaluation of a run that `--until` stopped; None on other ranks than 0."""
    if distributed.rank() != 0:
        return None
    evaluations = [entry for entry in loop.progress.log_history if "eval_loss" in entry]
    last = {name[5:]: value for name, value in (evaluations or [{}])[-1].items() if name.startswith("eval_")}
    steps = {"steps": loop.progress.global_step, "planned_steps": loop.schedule.total_steps}
    log.info("step %d of %d (--until), with a checkpoint: without --until it goes on", *steps.values())
    return {"run": run.name, **steps, "eval": last}


def finish(job: Job, loop: TrainingLoop, run: Run, root: Path) -> dict[str, Any]:
    """Writes the adapter or the model, marks the run finished and returns its summary. Every rank calls it."""
    best = loop.load_best()
    weights = shard.whole_state(loop.model)
    return distributed.on_rank0(lambda: _write_result(job, loop, run, root, best, weights))


def _write_result(
    job: Job, loop: TrainingLoop, run: Run, root: Path, best: int | None, weights: dict[str, Any] | None
) -> dict[str, Any]:
    from sft.training.checkpoint import is_adapter, save_weights

    progress, train, tuning = loop.progress, job.config.train, job.config.tuning
    target = run.adapter_dir if is_adapter(loop.model) else run.model_dir
    with files.atomic_folder(target) as staged:
        save_weights(loop.model, staged, weights)
        files.put(staged, partial(_save_tokenizer, job))
        job.write_settings(staged)
        files.write_json(staged / runs.SERVING, {"system": job.rows.system})
        files.write_manifest(staged)
    if progress.skipped:
        files.write_json(run.folder / "ledger.json", {**job.rows.ledger(), "skipped_windows": progress.skipped})
    losses = [entry["loss"] for entry in progress.log_history if "loss" in entry]
    evaluations = [entry for entry in progress.log_history if "eval_loss" in entry]
    shown = next((entry for entry in evaluations if entry["step"] == best), evaluations[-1] if evaluations else {})
    names = sorted(key[5:] for key in shown if key.startswith("eval_") and key not in ("eval_seconds", "eval_loss"))
    summary: dict[str, Any] = {  # losses: means over labelled tokens; seconds: of training steps only
        "run": run.name,
        "steps": progress.global_step,
        "planned_steps": job.schedule.total_steps,
        "epochs": round(progress.epoch, 2),
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "best_step": best,
        "skipped_windows": len(progress.skipped),
        "eval": {name: shown[f"eval_{name}"] for name in (["loss"] if shown else []) + names},
        "tokens": progress.tokens,
        "labelled_tokens": progress.labelled,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "peak_memory_gib": round(peak_bytes() / 2**30, 3),
        "device": job.device.name,
        "output": str(target),
    }
    settings: dict[str, Any] = {"model": job.files.name, "mode": tuning.mode, "backend": job.backend.name}
    settings |= {name: float(getattr(train, name)) for name in ("learning_rate", "effective_batch", "epochs")}
    settings |= {"rows": len(job.rows.train), "lora_r": tuning.lora.r, "lora_alpha": tuning.lora.alpha}
    results = {f"hparam/{name}": float(shown[f"eval_{name}"]) for name in summary["eval"]}
    results["hparam/train_loss"] = losses[-1] if losses else 0.0
    loop.loggers.close(progress.global_step, settings, results)
    runs.point_last(run, root)
    files.write_json(run.folder / runs.FINISHED, summary)
    return summary


def _save_tokenizer(job: Job, folder: Path) -> None:
    """Saves the tokenizer with the very template that was trained on. A template over turns, which other libraries
    cannot use, is saved beside it as template.jinja.
    """
    tokenizer, template = job.encoder.tokenizer, job.encoder.template
    own_template, over_messages = tokenizer.chat_template, template.style == "messages"
    if over_messages and template.tool_source is None:
        tokenizer.chat_template = template.source
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own_template
    if not over_messages:
        (folder / "template.jinja").write_text(template.source, encoding="utf-8")


def peak_bytes() -> int:
    """The most memory that this process has used: of the GPU if there is one, else of the system."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_result(job: Job, summary: dict[str, Any], root: Path) -> list[str]:
    """What a user sees after training, and what to do next."""
    from sft.training.loggers import clock

    first, last, scores = summary["train_loss_first"], summary["train_loss_last"], summary["eval"]
    loss = "" if first is None else f", loss {first:.4f} -> {last:.4f}"
    lines = [
        f"{summary['run']} is finished: {summary['steps']:,} steps in {clock(summary['seconds'])}{loss},"
        f" {summary['tokens_per_second']:,.0f} tokens/s, peak memory {summary['peak_memory_gib']:.2f} GiB",
    ]
    if summary["steps"] < summary["planned_steps"]:
        lines.append(f"stopped early ({summary['planned_steps']:,} steps were planned): evaluation no longer improved")
    if scores:
        chosen = "the best checkpoint" if summary["best_step"] else "the last evaluation"
        named = [name for name in ("rougeL", "exact_match", "stop_rate") if name in scores]
        shown = "".join(f", {name} {scores[name]:.4f}" for name in named)
        lines.append(f"{chosen} (step {summary['best_step'] or summary['steps']}): loss {scores['loss']:.4f}{shown}")
    lines += [
        f"written to {display_path(Path(summary['output']), root)}",
        "next:   make eval    (scores it on the validation rows; make eval-test for the test rows)",
        "next:   make infer   (chat with it)",
    ]
    if job.config.tuning.mode != "full" and job.config.tuning.adapter == "lora" and not job.config.train.merge_at_end:
        lines.append("next:   make merge   (one model, without the adapter)")
    return lines
