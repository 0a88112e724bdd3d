"""A trainer on made-up token rows: the loop, checkpoints and resuming without files of rows or templates."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from sft import runs
from sft.config import auto
from sft.config.schema import Config
from sft.model import hub
from sft.step.step import make_step_config
from sft.training import model, plan
from sft.training.checkpoint import CheckpointManager
from sft.training.flow import Flow
from sft.training.signals import SignalHandler
from sft.training.trainer import WindowTrainer


def features(count: int, *, seed: int = 0, kind: str = "causal") -> list[dict[str, Any]]:
    """Rows of 6 to 20 tokens, the last half labelled; the labels follow a rule that can be learnt."""
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


def trainer(settings: Config, *, rows: int = 10, validation: int = 4, callbacks: Any = ()) -> WindowTrainer:
    """The trainer of `settings` on made-up rows; 10 rows in steps of 4 are 3 windows an epoch, the last one smaller."""
    files = hub.find(settings.model, Path("/"))
    made = model.build(settings, files, "bnb", device="cpu")
    out = Path(settings.train.output_dir)
    run = runs.at(out, out.parent.parent)
    run.folder.mkdir(parents=True, exist_ok=True)
    steps = plan.make(settings, rows, validation=validation > 0)
    flow = Flow(steps, SignalHandler(run.folder), settings.train.early_stopping)
    return WindowTrainer(
        made,
        steps.arguments(settings.train, run, device="cpu"),
        features(rows, kind=files.kind),
        features(validation, seed=1, kind=files.kind),
        effective_batch=int(settings.train.effective_batch),
        step_config=make_step_config(settings.train, made, files.kind, "cpu"),
        keeper=CheckpointManager(
            run, settings.train.save_total_limit, lambda folder: runs.write_resolved(folder, settings)
        ),
        flow=flow,
        callbacks=callbacks,
        on_nan=settings.train.on_nan,
    )


def trained(trainer: WindowTrainer) -> dict[str, Any]:
    """The trained weights by name, copied."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


__all__ = ["config", "features", "trained", "trainer"]
