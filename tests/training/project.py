"""A small project in a folder: processed rows, a config, and the train command run on it in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import train as command

NAMES = ["Mara Olsen", "Ivo Petrov", "Ana Lima", "Kofi Mensah", "Lena Braun"]
CONFIG = """
model: {{name: {model}, max_seq_len: 128}}
tuning: {{mode: {mode}, lora: {{r: 8, dropout: 0.1}}}}
train: {{output_dir: outputs/t, max_steps: 6, learning_rate: 5.0e-3, effective_batch: 8, bf16: false,
  save_total_limit: 9, eval_strategy: steps, eval_steps: 2, save_steps: 2}}
generation: {{max_new_tokens: 8}}
logging: {{log_interval: 2}}
eval: {{train_sample: 4}}
"""


def make(root: Path, model: Path, *, mode: str = "lora", rows: int = 20) -> Path:
    """Writes data/processed and config.yaml below `root`; returns `root`."""
    draw = random.Random(0)
    folder = root / "data" / "processed"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("val", 6), ("test", 4)):
        lines = []
        for index in range(count):
            name, order = draw.choice(NAMES), draw.randrange(1000, 9999)
            row = {"id": f"{split}-{index}", "system": "", "user": f"Name: {name}; order {order}.", "assistant": name}
            lines.append(json.dumps({**row, "grade": 1 + index % 3}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (root / "config.yaml").write_text(CONFIG.format(model=model, mode=mode), encoding="utf-8")
    return root


def as_pairs(root: Path) -> Path:
    """Makes each row of the project a pair: the right name against another answer. Returns `root`."""
    for path in (root / "data/processed").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [
            {"id": row["id"], "prompt": row["user"], "chosen": row["assistant"], "rejected": "Nobody at all"}
            for row in rows
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return root


def run(root: Path, *sets: str, resume: str = "auto", allow: tuple[str, ...] = (), dry: bool = False) -> Any:
    """What `python scripts/train.py` returns; SFT_ROOT must name `root`."""
    line = ["--config", str(root / "config.yaml"), "--resume", resume, *(["--dry-run"] if dry else [])]
    line += [part for one in sets for part in ("--set", one)] + [
        part for one in allow for part in ("--allow-change", one)
    ]
    return command.main(command.build_parser().parse_args(line))


def losses(root: Path, name: str, key: str = "train/loss") -> list[tuple[int, float]]:
    """The (step, value) pairs of a run's log.jsonl."""
    lines = (root / "outputs" / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(entry["step"], entry[key]) for entry in entries if key in entry]
