"""lm-evaluation-harness beside us: told how to install it, asked with what serving uses, its results read."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

import lm_eval as command
from sft.errors import ConfigError, EnvironmentProblem, ModelError
from sft.generation import load
from sft.report import harness
from tests.generation import tiny_runs


def test_where_it_is_missing_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EnvironmentProblem, match="not installed") as told:
        command.main(command.parser().parse_args(["--tasks", "hellaswag"]))
    assert "pip install 'lm_eval[hf]>=0.4.9'" in str(told.value)
    monkeypatch.setattr(metadata, "version", lambda name: "0.3.0")
    with pytest.raises(EnvironmentProblem, match="too old"):
        command.check_installed()
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.13")
    command.check_installed()
    with pytest.raises(ConfigError, match="no tasks"):  # make lm-eval, without TASKS=
        command.main(command.parser().parse_args(["--tasks", ""]))


def test_each_side_is_asked_as_it_is_served(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = tiny_runs.project(tmp_path, tiny_qwen2, mode="qlora")
    adapter = tiny_runs.finished_run(root)
    target = load.resolve_model(root / "configs" / "run_bnb.yaml", [], adapters=adapter, root=root)
    made = harness.command(target, "tuned", root, "a,b", tmp_path / "out", 5, chat=True)
    given = dict(pair.split("=") for pair in made[made.index("--model_args") + 1].split(","))
    assert (given["pretrained"], given["peft"], given["load_in_4bit"]) == (str(tiny_qwen2), str(adapter), "True")
    assert made[made.index("--tasks") + 1] == "a,b" and made[made.index("--limit") + 1] == "5"
    assert "--apply_chat_template" in made
    base = harness.command(target, "base", root, "a", tmp_path / "out", None, chat=False)
    assert "peft=" not in " ".join(base) and "load_in_4bit=True" in " ".join(base) and "--limit" not in base
    awkward = tmp_path / "a,b"
    adapter.rename(awkward)
    target = load.resolve_model(root / "configs" / "run_bnb.yaml", [], adapters=awkward, root=root)
    with pytest.raises(ModelError, match="cannot read a path"):
        harness.command(target, "tuned", root, "a", tmp_path / "out", None, chat=False)


def test_its_results_are_read_and_set_beside_each_other(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no results"):
        harness.read(tmp_path)
    measured = {"alias": "mini", "acc,none": 0.75, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "sample_len": 12}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "results_2026-11-21.json").write_text(json.dumps({"results": {"mini": measured}}))
    found = harness.read(tmp_path)
    assert found == {"mini acc": 0.75, "mini acc_norm": 0.5}
    columns, rows = harness.table({"tuned": found, "base": {"mini acc": 0.5}})
    assert columns == ["task and metric", "base", "tuned", "change"]
    assert rows[0] == ["mini acc", "0.5000", "0.7500", "+0.2500"] and rows[1] == ["mini acc_norm", "", "0.5000", ""]
