"""The end of a run: the best weights taken, the adapter or the model put in its place, the summary, the links."""

from __future__ import annotations

import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import files, runs
from sft.errors import Stopped
from sft.generation.load import SERVING
from sft.runs import Run
from sft.training import checkpoint, distributed, loggers
from sft.training.preparation import Job
from sft.training.trainer import WindowTrainer


def finish(job: Job, trainer: WindowTrainer, run: Run, root: Path) -> dict[str, Any]:
    """Writes what the run is for, marks it finished and returns its summary. Every rank calls it; rank 0 writes."""
    best = trainer.take_best()
    if distributed.rank() != 0:
        distributed.barrier()
        return {}
    target = run.adapter_dir if checkpoint.is_adapter(trainer.model) else run.model_dir
    with files.atomic_folder(target) as staged:
        checkpoint.save_weights(trainer.model, staged)
        files.put(staged, lambda folder: save_tokenizer(job, folder))
        trainer.keeper.beside(staged)
        files.write_json(staged / SERVING, {"system": job.rows.system})
        files.write_manifest(staged)
    if skipped := trainer.numbers.skipped:
        files.write_json(run.folder / "ledger.json", {**job.rows.ledger(), "skipped_windows": skipped})
    found = summary(job, trainer, run, best, target)
    _settings_tab(job, trainer, found)
    runs.point_last(run, root)
    runs.finish(run, found)
    distributed.barrier()
    return found


def save_tokenizer(job: Job, folder: Path) -> None:
    """The tokenizer with the very template that was trained on; one of turns, which other libraries cannot use, goes
    beside it as template.jinja.
    """
    tokenizer, kept = job.tokenizer, job.tokenizer.chat_template
    for_all = job.template.style == "messages"
    if for_all and job.template.tool_source is None:
        tokenizer.chat_template = job.template.source
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = kept
    if not for_all:
        (folder / "template.jinja").write_text(job.template.source, encoding="utf-8")


def summary(job: Job, trainer: WindowTrainer, run: Run, best: int | None, target: Path) -> dict[str, Any]:
    """What came of the run. Losses are means over labelled tokens; seconds are of training steps alone."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    scored = [entry for entry in history if "eval_loss" in entry]
    chosen = next((entry for entry in scored if entry["step"] == best), scored[-1] if scored else {})
    names = {key[5:] for key in chosen if key.startswith("eval_") and key != "eval_seconds"}
    return {
        "run": run.name,
        "steps": trainer.state.global_step,
        "planned_steps": job.plan.total_steps,
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "best_step": best,
        "best_lost": trainer.lost_best and asdict(trainer.lost_best),
        "skipped_windows": len(trainer.numbers.skipped),
        "eval": {name: chosen[f"eval_{name}"] for name in sorted(names, key=lambda name: (name != "loss", name))},
        "tokens": trainer.meter.tokens,
        "labelled_tokens": trainer.meter.labelled,
        "seconds": round(trainer.meter.seconds, 3),
        "tokens_per_second": round(trainer.meter.tokens / max(trainer.meter.seconds, 1e-9), 1),
        "peak_memory_gib": round(peak_bytes() / 2**30, 3),
        "device": job.device.name,
        "output": str(target),
    }


def peak_bytes() -> int:
    """The most memory that this process held: of the GPU where there is one, else of the system."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stop_if_asked(trainer: WindowTrainer, run: Run) -> None:
    """Raises Stopped, with the command that takes the run up again, if it was stopped before its end."""
    code = trainer.flow.watch.code
    if code is None or trainer.flow.complete(trainer.state):
        return
    raise Stopped(
        f"{run.name} was stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, "
        "with a checkpoint of it",
        exit_code=code,
        fix="the same command takes it up again (make train or make resume, or python scripts/train.py)",
    )


def merge(job: Job, run: Run, root: Path) -> Path:
    """Merges the run's adapter into 16-bit weights, in outputs/<run>/merged; returns the folder."""
    from sft.ship.merge import merge as merged

    out = run.folder / "merged"
    merged(run.adapter_dir, out, "bf16" if job.device.bf16 else "fp16", root)
    return out


def _settings_tab(job: Job, trainer: WindowTrainer, found: dict[str, Any]) -> None:
    train, tuning = job.config.train, job.config.tuning
    values = {
        "model": job.files.name,
        "mode": tuning.mode,
        "backend": job.backend.name,
        "learning_rate": train.learning_rate,
        "effective_batch": train.effective_batch,
        "epochs": train.epochs,
        "rows": len(job.rows.train),
        **({"lora_r": tuning.lora.r, "lora_alpha": tuning.lora.alpha} if tuning.mode != "full" else {}),
    }
    results = {f"hparam/{name}": float(value) for name, value in found["eval"].items()}
    results["hparam/train_loss"] = float(found["train_loss_last"] or 0.0)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, loggers.Logbook):
            for book in callback.books:
                if isinstance(book, loggers.Board):
                    book.settings(values, results)
            callback.close()
