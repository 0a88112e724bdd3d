"""What a report reads of a run: its curves from either book, its summary without paths, names fit to be shown."""

from __future__ import annotations

import json
from pathlib import Path

from sft import files, runs
from sft.config import load
from sft.report import compare


def test_curves_come_from_the_log(tmp_path: Path) -> None:
    run = runs.at(tmp_path / "outputs" / "r", tmp_path)
    assert compare.log_curves(run) == {}
    run.folder.mkdir(parents=True)
    lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "eval/loss": 2.5, "eval/samples": "text"}]
    torn = '{"step": 3, "train/lo'
    (run.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    assert compare.log_curves(run) == {"train/loss": [(1, 3.0)], "eval/loss": [(2, 2.5)]}


def test_a_summary_and_a_models_name_show_no_path_of_this_machine(tmp_path: Path) -> None:
    run = runs.at(tmp_path / "outputs" / "r", tmp_path)
    assert compare.training_summary(run) == {}
    run.folder.mkdir(parents=True)
    files.write_json(run.folder / runs.FINISHED, {"steps": 3, "output": str(tmp_path)})
    assert compare.training_summary(run) == {"steps": 3}
    for hub in ("Qwen/Qwen2.5-3B-Instruct", "gpt2"):
        assert load.model_name(hub) == hub and not load.is_model_folder(hub)
    assert load.model_name("/home/someone/models/mine") == "mine" == load.model_name("models/mine")
    assert load.is_model_folder("models/demo")
