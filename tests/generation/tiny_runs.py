"""A small project folder with rows and a finished run: a real adapter (random weights) on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SYSTEM = "Answer in one short sentence."
CONFIG = """
model:
  name: {model}
  max_seq_len: 256
tuning:
  mode: {mode}
train:
  output_dir: outputs/tiny
  bf16: false
  fp16: false
eval:
  batch_size: 4
generation:
  max_new_tokens: 12
"""


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows with one system text, of different lengths."""
    return [
        {
            "id": f"r{i}",
            "system": SYSTEM,
            "user": f"What is {i} + {i}?" + " Please." * (i % 4),
            "assistant": f"It is {2 * i}.",
        }
        for i in range(start, start + count)
    ]


def write_rows(path: Path, row_list: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in row_list), encoding="utf-8")


def project(root: Path, model: Path, *, mode: str = "lora") -> Path:
    """configs/run_bnb.yaml and processed rows under `root`; no run yet."""
    (root / "configs").mkdir(parents=True, exist_ok=True)
    (root / "configs" / "run_bnb.yaml").write_text(CONFIG.format(model=model, mode=mode), encoding="utf-8")
    for split, count, start in (("train", 12, 0), ("val", 5, 20), ("test", 7, 40)):
        write_rows(root / "data" / "processed" / f"{split}.jsonl", rows(count, start))
    return root


def finished_run(root: Path, *, name: str = "tiny", seed: int = 1, scale: float = 0.3) -> Path:
    """Attaches an adapter with random weights and saves it as training would; returns its folder."""
    import torch

    from sft import runs
    from sft.config.load import load
    from sft.model import adapters, hub
    from sft.model import load as loading

    config = load(root / "configs" / "run_bnb.yaml", root=root).config
    files = hub.find(config.model, root)
    model = loading.load_base(
        files, config.model, config.tuning, torch.float32, device="cpu", train=True, quantise=False
    )
    torch.manual_seed(seed)
    adapted = adapters.attach(model, config.tuning, gradient_checkpointing=False)
    for weight_name, weight in adapted.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=scale)
    run = runs.at(root / "outputs" / name, root)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.adapter_dir.mkdir(parents=True, exist_ok=True)
    adapters.save(adapted, run.adapter_dir)
    runs.write_resolved(run.folder, config)
    runs.write_resolved(run.adapter_dir, config)
    (run.folder / runs.FINISHED).write_text("{}")
    runs.point_last(run, root)
    return run.adapter_dir


def two_runs(root: Path, model: Path) -> Path:
    """A project with the finished runs `first` and `second`, of other adapters of one base."""
    project(root, model)
    for seed, name in enumerate(("first", "second")):
        finished_run(root, name=name, seed=seed)
    return root
