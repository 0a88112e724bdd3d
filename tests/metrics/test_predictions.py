"""Predictions files and metrics.json: every error with its line, the side that was not scored again, the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft import files
from sft.errors import DataError
from sft.metrics import predictions
from tests.metrics.helpers import score


def merged(previous: object, **changes: object) -> dict[str, object]:
    arguments = {"run": "r", "split": "test", "rows": 4, "sides": {}, "constant": None} | changes
    return predictions.merge_metrics(previous, **arguments)  # type: ignore[arg-type]


def test_scores_of_the_other_model_stay_for_the_same_run_and_split_only() -> None:
    constant = {"answer": "x", "rougeL": 0.1, "exact_match": 0.0}
    tuned = merged({}, sides={"tuned": {"metrics": {"rougeL": 0.5}}}, constant=constant)
    assert "base" not in tuned
    both = merged(tuned, sides={"base": {"metrics": {"rougeL": 0.123456789}}}, rows=3)
    assert (both["tuned"], both["base"], both["rows"]) == ({"rougeL": 0.5}, {"rougeL": 0.123457}, 3)
    assert both["constant"] == tuned["constant"]
    assert {side: about["rows"] for side, about in both["about"].items()} == {"tuned": 4, "base": 3}  # type: ignore
    assert "tuned" not in merged(tuned, split="val", sides={"base": {"metrics": {"rougeL": 0.1}}})
    assert "tuned" not in merged(tuned, run="r-2", sides={"base": {"metrics": {"rougeL": 0.1}}})


def test_results_are_written_to_outputs_and_to_the_run(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "r"
    run.mkdir(parents=True)
    result = merged({}, sides={"tuned": {"metrics": {"rougeL": 0.5}, "fields": {"name": 1.0}}})
    predictions.write_results(tmp_path / "outputs", run, result, [{"id": "1", "prediction": "é\n"}])
    for folder in (tmp_path / "outputs", run):
        assert files.read_json(folder / "metrics.json") == result
        assert json.loads((folder / "samples.jsonl").read_text()) == {"id": "1", "prediction": "é\n"}
    assert result["about"]["tuned"]["fields"] == {"name": 1.0}  # type: ignore[index]
    (run / "metrics.json").write_text("{")
    assert files.read_json(run / "metrics.json") == {}


def test_the_table_marks_what_got_worse() -> None:
    result = merged(
        {},
        sides={
            "tuned": {"metrics": {"rougeL": 0.5, "loss": 1.5, "length_words": 3.0}},
            "base": {"metrics": {"rougeL": 0.25, "loss": 1.0}},
        },
        constant={"answer": "x", "rougeL": 0.1, "exact_match": 0.0},
    )
    assert predictions.metrics_table(result) == (
        ["metric", "base", "tuned", "change", "best constant answer"],
        [
            ["rougeL", "0.2500", "0.5000", "+0.2500", "0.1000"],
            ["loss", "1.0000", "1.5000", "+0.5000 worse", ""],
            ["length_words", "", "3.0000", "", ""],
        ],
    )
    alone = merged({}, sides={"base": {"metrics": {"sari": 40.123}}})
    assert predictions.metrics_table(alone) == (["metric", "base"], [["sari", "40.12"]])


def test_a_predictions_file_is_read_with_the_line_of_every_fault(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"prediction": "a", "reference": ["a", "b"], "source": "q"}\n\n{"prediction": "", "reference": "c"}\n'
    )
    answers = predictions.read(path)
    assert (answers.predictions, answers.references, answers.sources) == (["a", ""], [["a", "b"], ["c"]], None)
    for line, problem in [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"prediction": "a"}', '"reference" is missing'),
        ('{"prediction": 4, "reference": "a"}', '"prediction" is int'),
    ]:
        path.write_text('{"prediction": "a", "reference": "b"}\n' + line)
        with pytest.raises(DataError, match=problem) as error:
            predictions.read(path)
        assert error.value.where == f"{path}:2"


def test_a_file_is_scored_by_tag_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"prediction": "a", "reference": ["b", "a"], "category": "x"}\n'
        '{"prediction": "b", "reference": "c", "tag": "x"}\n'
        '{"prediction": "c", "reference": "c", "tags": ["y"]}\n'
    )
    scores = predictions.score_file(path, ["exact_match", "bleu"], strict=True)
    assert (scores["rows"], scores["metrics"]["exact_match"]) == (3, pytest.approx(2 / 3))
    alone = score(["bleu"], ["a", "b"], [["b", "a"], ["c"]])["bleu"]  # of the tag's rows as a corpus
    assert scores["by_tag"] == {
        "x": {"rows": 2, "exact_match": 0.5, "bleu": alone}, "y": {"rows": 1, "exact_match": 1.0, "bleu": 0.0},
    }  # fmt: skip
