"""`make lm-eval`: says how to install the harness; runs its tasks on the model that was trained, NF4 base included."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

import lm_eval as command
from sft.errors import ConfigError, EnvironmentProblem
from tests.generation import tiny_runs

TASK = """
task: mini
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def test_a_missing_harness_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EnvironmentProblem, match="not installed") as error:
        command.main(command.parser().parse_args(["--tasks", "hellaswag"]))
    assert "pip install 'lm_eval[hf]>=0.4.9'" in str(error.value)
    monkeypatch.setattr(metadata, "version", lambda name: "0.3.0")
    with pytest.raises(EnvironmentProblem, match="too old"):
        command.check_installed()
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.13")
    command.check_installed()
    with pytest.raises(ConfigError, match="no tasks"):  # make lm-eval, without TASKS=
        command.main(command.parser().parse_args(["--tasks", ""]))


def test_the_harness_runs_on_the_nf4_model_that_was_trained(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        pytest.skip("lm-evaluation-harness is not installed")
    root = tiny_runs.project(tmp_path, tiny_qwen2, mode="qlora")
    tiny_runs.finished_run(root)
    questions = [{"question": f"{n} + {n}?", "right": f" {2 * n}", "wrong": " no"} for n in range(6)]
    (root / "mini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (root / "mini.yaml").write_text(TASK.format(path=root / "mini.jsonl"))
    monkeypatch.setenv("SFT_ROOT", str(root))
    monkeypatch.chdir(root)
    flags = ["--config", "configs/run_bnb.yaml", "--adapters", "adapters/tiny", "--tasks", str(root / "mini.yaml")]
    result = command.main(command.parser().parse_args([*flags, "--limit", "4", "--", "--num_fewshot", "0"]))
    assert set(result["tuned"]) == set(result["base"]) == {"mini acc"}
    assert {path.parent.name for path in (root / "outputs/tiny/lm_eval").rglob("results_*.json")} == {"tuned", "base"}
    with pytest.raises(ConfigError, match="num_fewshot"):
        command.main(command.parser().parse_args([*flags, "--", "--num_fewshots", "0"]))


def test_scores_of_base_and_tuned_are_in_one_table() -> None:
    measured = {"alias": "mini", "acc,none": 0.75, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "sample_len": 12}
    tuned = command.read_scores({"mini": measured})
    assert tuned == {"mini acc": 0.75, "mini acc_norm": 0.5}
    columns, rows = command.table({"tuned": tuned, "base": {"mini acc": 0.5}})
    assert columns == ["task and metric", "base", "tuned", "change"]
    assert rows[0] == ["mini acc", "0.5000", "0.7500", "+0.2500"] and rows[1] == ["mini acc_norm", "", "0.5000", ""]
