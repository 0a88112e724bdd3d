"""A training loop on made-up token rows: no files of rows, no templates."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from sft import runs
from sft.config import auto
from sft.config.schema import Config
from sft.model import hub
from sft.step.step import make_step_config
from sft.training import distributed, job
from sft.training.checkpoint import CheckpointManager
from sft.training.loop import TrainingLoop


def features(count: int, *, seed: int = 0, kind: str = "causal") -> list[dict[str, Any]]:
    """Rows of 6 to 20 tokens, the last half labelled; the labels follow a rule that a model can learn."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        ids = [draw.randrange(20, 60) for _ in range(draw.randrange(6, 20))]
        half = len(ids) // 2
        ids[half:] = [20 + (ids[half - 1] + i) % 40 for i in range(len(ids) - half)]
        labels = ids[half:] if kind == "seq2seq" else [-100] * half + ids[half:]
        rows.append({"id": f"row-{index}", "input_ids": ids[:half] if kind == "seq2seq" else ids, "labels": labels})
    return rows


def config(folder: Path, out: Path, **sections: dict[str, Any]) -> Config:
    """A resolved config for a tiny model on the CPU."""
    train = {"output_dir": str(out), "bf16": False, "effective_batch": 4, "learning_rate": 1e-2, "epochs": 3}
    raw = {
        "model": {"name": str(folder), "max_seq_len": 64},
        "tuning": {"mode": "lora", "lora": {"r": 4, "dropout": 0.1}, **sections.get("tuning", {})},
        "train": {**train, **sections.get("train", {})},
        "logging": {"log_interval": 1, **sections.get("logging", {})},
    }
    parsed = Config.model_validate(raw)
    return auto.resolve(parsed, auto.Facts(device="cpu", parameters=100_000, train_rows=10)).config


def make_loop(settings: Config, *, rows: int = 10, validation: int = 4, **more: Any) -> TrainingLoop:
    """The training loop of `settings` on made-up rows; 10 rows in steps of 4 are 3 steps an epoch.

    more: further arguments of TrainingLoop.
    """
    model_files = hub.find(settings.model, Path("/"))
    model = job.load_model(settings, model_files, "bnb", device="cpu")
    distributed.shard_model(model, settings)
    out = Path(settings.train.output_dir)
    run = runs.at(out, out.parent.parent)
    run.folder.mkdir(parents=True, exist_ok=True)
    rehearsed = more["rehearsal"].features if "rehearsal" in more else []
    return TrainingLoop(
        model,
        [*features(rows, kind=model_files.kind), *rehearsed],
        features(validation, seed=1, kind=model_files.kind),
        config=settings,
        schedule=job.make_schedule(settings, rows, validation=validation > 0),
        step=make_step_config(settings.train, model, model_files.kind, "cpu"),
        checkpoints=CheckpointManager(
            run, settings.train.save_total_limit, lambda folder: runs.write_resolved(folder, settings)
        ),
        **more,
    )


def trained(loop: TrainingLoop) -> dict[str, Any]:
    """The trained weights by name, copied."""
    return {name: p.detach().clone() for name, p in loop.model.named_parameters() if p.requires_grad}


def logged(loop: TrainingLoop, key: str) -> list[float]:
    """The values of `key` in the loop's history, in order."""
    return [entry[key] for entry in loop.progress.log_history if key in entry]
