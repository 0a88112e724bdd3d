"""What a run left on the disk that a report tells of: its curves, its summary, its settings, its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft import files
from sft.runs import FINISHED, Run

Points = list[tuple[float, float]]


def curves(run: Run) -> dict[str, Points]:
    """{name: [(step, value)]} from the run's log.jsonl, else from TensorBoard's event files; nothing without either."""
    found: dict[str, Points] = {}
    path = run.folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # a last line that a crash cut short
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((entry["step"], value))
    return found or _events(run.tb_dir)


def _events(folder: Path) -> dict[str, Points]:
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {name: [(one.step, one.value) for one in board.Scalars(name)] for name in board.Tags()["scalars"]}


def summary(run: Run) -> dict[str, Any]:
    """The run's finished.json without machine paths."""
    return {name: value for name, value in files.read_json(run.folder / FINISHED).items() if name != "output"}
