"""style_prompt as a user runs it, after process_data and before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

CONFIG = ("--config", str(ROOT / "configs/config_base.yaml"))
Run = Callable[..., Any]


def test_styles_all_splits_or_one_file_and_names_presets(command: Run, tmp_path: Path) -> None:
    root = {"SFT_ROOT": str(tmp_path)}
    (tmp_path / "raw.jsonl").write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(50))
    )
    assert command("process_data", *CONFIG, "--raw_path", "raw.jsonl", **root).returncode == 0

    without = command("style_prompt", *CONFIG, **root)
    assert without.returncode == 2 and "--style is missing" in without.stderr
    assert all(preset in without.stderr for preset in ("concise", "json", "step-by-step", "structured"))
    assert not (tmp_path / "data/processed_with_style").exists()

    done = command("style_prompt", *CONFIG, "--style", "Answer like a clerk.", "--json", **root)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert sum(result["rows"].values()) == 50 and set(result["rows"]) == {"train", "val", "test"}
    first = json.loads((tmp_path / "data/processed_with_style/train.jsonl").read_text().splitlines()[0])
    assert first["system"] == "Answer like a clerk."

    one = ("--in", "data/processed/val.jsonl", "--out", "styled.jsonl", "--mode", "append", "--style", "concise")
    assert command("style_prompt", *CONFIG, *one, **root).returncode == 0
    assert len((tmp_path / "styled.jsonl").read_text().splitlines()) == result["rows"]["val"]
    again = ("--in", "styled.jsonl", "--out", "again.jsonl", "--style", "json")
    replaced = command("style_prompt", *CONFIG, *again, **root)
    assert f"again.jsonl: the style replaces the system text of {result['rows']['val']} rows" in replaced.stderr
    half = command("style_prompt", *CONFIG, "--style", "concise", "--in", "x.jsonl", **root)
    assert half.returncode == 2 and "--in and --out go together" in half.stderr
