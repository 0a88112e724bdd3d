"""lm-evaluation-harness as a program beside us: the command that opens a side as we do, and the results it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from sft.errors import EnvironmentProblem, ModelError
from sft.generation.load import Target
from sft.model import hardware, hub

Side = Literal["base", "tuned"]


def command(
    target: Target, side: Side, root: Path, tasks: str, out: Path, limit: int | None, *, chat: bool
) -> list[str]:
    """The harness's command line for one side: the same weights, adapter, 4-bit base and tokenizer as in serving.

    Raises ModelError where the model is not here, or a name holds what the harness cannot read.
    """
    config, device = target.config, hardware.probe().device
    tuned = target.folder if side == "tuned" else None
    whole = tuned is not None and tuned == target.merged
    files = hub.find(config.model, root, weights=True)
    given = {"pretrained": str(tuned if whole else files.path)}
    if tuned is not None and not whole:
        given["peft"] = str(tuned)
    if config.tuning.mode == "qlora" and not whole:
        given["load_in_4bit"] = "True"
    given["dtype"] = "float32" if device == "cpu" else "auto"
    if target.folder is not None and (target.folder / "tokenizer_config.json").is_file():
        given["tokenizer"] = str(target.folder)
    if config.model.trust_remote_code:
        given["trust_remote_code"] = "True"
    if awkward := [value for value in given.values() if "," in value or "=" in value]:
        raise ModelError(f"the harness cannot read a path with , or = in it: {awkward[0]}", fix="rename the folder")
    made = [sys.executable, "-m", "lm_eval", "--model", "hf" if files.kind == "causal" else "hf-seq2seq"]
    made += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items()), "--tasks", tasks]
    made += ["--output_path", str(out), "--device", "cuda:0" if device == "cuda" else "cpu"]
    made += ["--limit", str(limit)] if limit is not None else []
    return [*made, *(["--apply_chat_template"] if chat else [])]


def check(code: int, side: Side) -> None:
    """Raises EnvironmentProblem where the harness ended badly; what it said stands above."""
    if code:
        raise EnvironmentProblem(
            f"the harness ended with code {code} on the {side} side",
            fix="read what it says above; `lm_eval ls tasks` lists its tasks, whose data come from the hub",
        )


def read(folder: Path) -> dict[str, float]:
    """`{"task metric": value}` of the newest results below the folder. Raises EnvironmentProblem without any."""
    written = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not written:
        raise EnvironmentProblem("the harness left no results", where=str(folder), fix="read what it says above")
    found = json.loads(written[-1].read_text(encoding="utf-8"))["results"]
    return {
        f"{task} {name.removesuffix(',none')}": float(value)
        for task, metrics in found.items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in name and "sample_len" not in name
    }


def table(found: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of both sides, without a word on which is better: the harness does not say it of its metrics."""
    sides = [side for side in ("base", "tuned") if side in found]
    rows = []
    for name in dict.fromkeys(name for side in sides for name in found[side]):
        values = [found[side].get(name) for side in sides]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        if len(sides) == 2:
            base, tuned = values
            cells.append("" if base is None or tuned is None else f"{tuned - base:+.4f}")
        rows.append([name, *cells])
    return ["task and metric", *sides, *(["change"] if len(sides) == 2 else [])], rows
