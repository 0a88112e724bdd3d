"""eval.py as a user runs it: a file of answers, a finished run, its base, and what cannot be evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.generation import tiny_runs

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    root = tiny_runs.project(tmp_path_factory.mktemp("eval-project"), tiny_qwen2)
    tiny_runs.finished_run(root)
    return root


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_and_its_base_are_measured_and_kept(command: Command, project: Path) -> None:
    done = command("eval", "--split", "test", "--both", "--samples", "1", "--json", SFT_ROOT=str(project))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["run"], result["split"], result["rows"]) == ("tiny", "test", 7)
    for side in ("tuned", "base"):
        assert set(result[side]) == {
            "rougeL", "sari", "exact_match", "loss", "perplexity", "length_words", "repetition", "empty_rate",
            "length_tokens", "stop_rate", "format_adherence",
        }  # fmt: skip
        assert result[side]["length_tokens"] <= 12
    assert result["tuned"]["loss"] != result["base"]["loss"]
    assert result["constant"]["answer"].startswith("It is ") and result["constant"]["exact_match"] == 0.0
    assert "answer:    " in done.stderr and "best constant answer" in done.stderr
    outputs = project / "outputs"
    assert json.loads((outputs / "metrics.json").read_text()) == result
    assert (outputs / "tiny" / "metrics.json").read_text() == (outputs / "metrics.json").read_text()
    samples = lines(outputs / "samples.jsonl")
    assert [sample["id"] for sample in samples] == [f"r{i}" for i in range(40, 47)]
    assert samples[0]["reference"] == "It is 80." and samples[0]["prompt"] == "What is 40 + 40?"
    names = {"rougeL", "sari", "exact_match", "format_adherence"}
    assert set(samples[0]["scores"]) == names == set(samples[0]["base"]["scores"])

    again = command(
        "eval", "--split", "test", "--base", "--limit", "3", "--json", "--metrics", "rougeL", SFT_ROOT=str(project)
    )
    assert again.returncode == 0, again.stderr
    after = json.loads(again.stdout)
    assert after["tuned"] == result["tuned"] and after["rows"] == 3
    assert "sari" not in after["base"]
    assert "measured on different rows" in again.stderr


def test_answers_made_elsewhere_are_scored_and_nothing_is_touched(command: Command, tmp_path: Path) -> None:
    tiny_runs.project(tmp_path, Path("no-model-is-needed"))
    (tmp_path / "answers.jsonl").write_text(
        '{"prediction": "About 95 you now get in.", "source": "About 95 species are currently accepted.",'
        ' "reference": ["About 95 species are currently known.", "About 95 species are now accepted.",'
        ' "95 species are now accepted."]}'
    )
    before = sorted(tmp_path.rglob("*"))
    done = command("eval", "--predictions", "answers.jsonl", "--json", SFT_ROOT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == 1
    assert result["metrics"]["sari"] == pytest.approx(26.953601953601954)
    assert result["metrics"]["exact_match"] == 0.0
    assert sorted(tmp_path.rglob("*")) == before
    unknown = command("eval", "--predictions", "answers.jsonl", "--metrics", "rougL", SFT_ROOT=str(tmp_path))
    assert unknown.returncode == 2
    assert "did you mean rougeL?" in unknown.stderr and "Traceback" not in unknown.stderr


def test_what_cannot_be_evaluated_is_told_at_once(command: Command, tmp_path: Path, project: Path) -> None:
    tiny_runs.project(tmp_path, Path("models/none"))
    no_run = command("eval", SFT_ROOT=str(tmp_path))
    assert no_run.returncode == 2 and "make train" in no_run.stderr
    gone = command("eval", "--adapters", "adapters/none", SFT_ROOT=str(tmp_path))
    assert gone.returncode == 2 and "there is no adapter folder adapters/none" in gone.stderr
    broken = command("eval", "--predictions", "configs/run_bnb.yaml", SFT_ROOT=str(tmp_path), cwd=tmp_path)
    assert broken.returncode == 2 and "run_bnb.yaml:2" in broken.stderr
    no_split = command("eval", "--set", "data.processed_dir=elsewhere", SFT_ROOT=str(project))
    assert no_split.returncode == 2 and "make process" in no_split.stderr
    assert not any("Traceback" in done.stderr for done in (no_run, gone, broken, no_split))
