"""The stamp of a run: what its checkpoints depend on, and the refusal to go on under other settings."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft import files
from sft.errors import RunError

STAMP = "backend.json"
FOLLOWS = {
    "data": "rows that were learnt may come again, others not in this epoch",
    "seed": "the order of rows is another from here on",
    "effective_batch": "the epoch goes on at the row that this many steps of the new size reach",
    "world_size": "dropout draws other numbers",
    "template": "what was learnt so far was written otherwise",
    "weights": "the adapter was made for other weights",
    "revision": "the adapter goes on over that revision's weights",
    "max_seq_len": "other rows may be left out, or cut otherwise",
    "labels": "other tokens are learnt from here on",
    "total_steps": "the rate jumps to where the new plan has it",
    "learning_rate": "the rate jumps to where the new plan has it",
    "lr_scheduler_type": "the rate jumps to where the new plan has it",
    "warmup_steps": "the rate jumps to where the new plan has it",
    "weight_decay": "it holds from the next step",
    "max_grad_norm": "it holds from the next step",
    "label_smoothing": "it holds from the next step, and losses before and after do not compare",
}
FIXED = {"backend", "mode", "kind", "base_model", "precision", "lora", "optim"}


def write(folder: Path, stamp: dict[str, Any]) -> None:
    """Records the stamp in a run's or a checkpoint's folder."""
    files.write_json(folder / STAMP, stamp)


def check(folder: Path, stamp: dict[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Compares with the stamp in `folder`; returns the changes that `allowed` accepts, as text.

    Raises RunError with every other difference (was, is). A change of what is FIXED can never be accepted: the
    weights would not fit, or would be others.
    """
    try:
        old = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{STAMP} cannot be read ({type(error).__name__}), so nobody knows what the checkpoint belongs to",
            where=str(folder / STAMP),
            mend="--resume never starts a new run",
        ) from None
    new = json.loads(json.dumps(stamp, default=str))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    lines = {key: f"{key}: was {old.get(key)}, is {new.get(key)}" for key in changed}
    refused = [key for key in changed if key in FIXED or key not in set(allowed)]
    if not refused:
        return [line + (f" ({FOLLOWS[key]})" if key in FOLLOWS else "") for key, line in lines.items()]
    mend = "--resume never starts a new run; or set them back"
    if not FIXED & set(refused):
        mend += "; or accept what follows: " + " ".join(f"--allow-change {key}" for key in refused)
    raise RunError(
        "this run was started with other settings, so it cannot be taken up:\n"
        + "\n".join(f"  {lines[key]}" for key in refused),
        where=str(folder / STAMP),
        mend=mend,
    )
