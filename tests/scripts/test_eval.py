"""eval.py: a finished run and its base as a user runs it, a file of answers, and what cannot be evaluated."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.errors import SftError
from tests.generation import tiny_runs
from tests.training import project as training

Command = Callable[..., Any]
evaluate = importlib.import_module("eval")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    root = tiny_runs.project(tmp_path_factory.mktemp("eval-project"), tiny_qwen2)
    tiny_runs.finished_run(root)
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the command's own main in this process; errors are raised."""

    def call(root: Path, *flags: str) -> dict[str, Any]:
        monkeypatch.setenv("SFT_ROOT", str(root))
        monkeypatch.chdir(root)
        args = evaluate.parser().parse_args(list(flags))
        args.config = args.config or evaluate.console.default_config()
        result: dict[str, Any] = evaluate.main(args)
        return result

    return call


def test_the_rows_of_the_run_are_evaluated_and_a_change_of_them_is_a_warning(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import style_prompt

    root = training.make(tmp_path, tiny_qwen2)
    monkeypatch.setenv("SFT_ROOT", str(root))
    training.run(root, "train.max_steps=1", "train.eval_strategy=no")
    flags = ["--config", str(root / "config.yaml"), "--style", "Answer like a pirate."]
    style_prompt.main(style_prompt.build_parser().parse_args(flags))  # written after the run, so not its rows
    run(root, "--config", "config.yaml", "--split", "test")
    assert "pirate" not in (root / "outputs" / "samples.jsonl").read_text()
    assert not [record for record in caplog.records if "has changed since" in record.getMessage()]
    with (root / "data" / "processed" / "train.jsonl").open("a") as file:
        file.write('{"id": "new", "user": "New?", "assistant": "Yes."}\n')
    run(root, "--config", "config.yaml", "--split", "test")
    assert "data/processed/train.jsonl has changed since t was trained" in caplog.text


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_and_its_base_are_evaluated_and_written(
    command: Command, project: Path, run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert "answer:    " in done.stderr
    assert "best constant answer: what always answering 'It is " in done.stderr
    outputs = project / "outputs"
    assert json.loads((outputs / "metrics.json").read_text()) == result
    assert (outputs / "tiny" / "metrics.json").read_text() == (outputs / "metrics.json").read_text()
    samples = lines(outputs / "samples.jsonl")
    assert [sample["id"] for sample in samples] == [f"r{i}" for i in range(40, 47)]
    assert samples[0]["reference"] == "It is 80." and samples[0]["prompt"] == "What is 40 + 40?"
    names = {"rougeL", "sari", "exact_match", "format_adherence"}
    assert set(samples[0]["scores"]) == names == set(samples[0]["base"]["scores"])

    (stored,) = (project / ".cache" / "base_answers").iterdir()
    written = stored.stat().st_mtime_ns
    again = run(project, "--split", "test", "--both")  # the base's answers are stored, the tuned model's are not
    assert stored.stat().st_mtime_ns == written
    assert (again["tuned"], again["base"], again["about"]["base"]) == (
        result["tuned"], result["base"], result["about"]["base"],
    )  # fmt: skip
    assert (outputs / "samples.jsonl").read_text() == "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)

    after = run(project, "--split", "test", "--base", "--limit", "3", "--metrics", "rougeL")
    assert after["tuned"] == result["tuned"] and after["rows"] == 3
    assert "sari" not in after["base"]
    assert "evaluated on different numbers of rows" in capsys.readouterr().err
    assert len(list(stored.parent.iterdir())) == 2


def test_answers_from_elsewhere_are_scored_and_no_file_is_written(command: Command, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "make train"),
        (["--adapters", "adapters/none"], "no adapter folder adapters/none"),
        (["--predictions", "configs/run_bnb.yaml"], "run_bnb.yaml:2"),
        (["--base", "--set", "data.processed_dir=elsewhere"], "make process"),
        (["--base", "--both"], "--base and --both exclude each other"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_opened(
    flags: list[str], message: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tiny_runs.project(tmp_path, Path("models/none"))
    with pytest.raises(SftError) as error:
        run(tmp_path, *flags)
    assert message in str(error.value) and error.value.exit_code == 2
