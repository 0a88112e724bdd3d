"""metrics.json keeps the side that was not measured again, and the table sets both beside the constant baseline."""

from __future__ import annotations

import json
from pathlib import Path

from sft import files
from sft.report import results


def merged(older: object, **kwargs: object) -> dict[str, object]:
    arguments = {"run": "r", "split": "test", "rows": 4, "sides": {}, "constant": None, "fields": {}} | kwargs
    return results.merged(older, **arguments)  # type: ignore[arg-type]


def test_the_other_side_stays_for_the_same_run_and_split_alone() -> None:
    tuned = merged({}, sides={"tuned": {"rougeL": 0.5}}, constant={"answer": "x", "rougeL": 0.1, "exact_match": 0.0})
    assert "base" not in tuned
    both = merged(tuned, sides={"base": {"rougeL": 0.123456789}}, rows=3)
    assert (both["tuned"], both["base"], both["rows"]) == ({"rougeL": 0.5}, {"rougeL": 0.123457}, 3)
    assert both["constant"] == tuned["constant"]
    assert {side: about["rows"] for side, about in both["about"].items()} == {"tuned": 4, "base": 3}  # type: ignore
    assert "tuned" not in merged(tuned, split="val", sides={"base": {"rougeL": 0.1}})
    assert "tuned" not in merged(tuned, run="r-2", sides={"base": {"rougeL": 0.1}})


def test_files_stand_in_outputs_and_with_the_run(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "r"
    run.mkdir(parents=True)
    result = merged({}, sides={"tuned": {"rougeL": 0.5}}, fields={"tuned": {"name": 1.0}})
    results.write(tmp_path / "outputs", run, result, [{"id": "1", "prediction": "é\n"}])
    for folder in (tmp_path / "outputs", run):
        assert files.read_json(folder / "metrics.json") == result
        assert json.loads((folder / "samples.jsonl").read_text()) == {"id": "1", "prediction": "é\n"}
    assert result["about"]["tuned"]["fields"] == {"name": 1.0}  # type: ignore[index]
    (run / "metrics.json").write_text("{")
    assert files.read_json(run / "metrics.json") == {}


def test_the_table_marks_what_got_worse() -> None:
    result = merged(
        {},
        sides={"tuned": {"rougeL": 0.5, "loss": 1.5, "length_words": 3.0}, "base": {"rougeL": 0.25, "loss": 1.0}},
        constant={"answer": "x", "rougeL": 0.1, "exact_match": 0.0},
    )
    assert results.table(result) == (
        ["metric", "base", "tuned", "change", "best constant answer"],
        [
            ["rougeL", "0.2500", "0.5000", "+0.2500", "0.1000"],
            ["loss", "1.0000", "1.5000", "+0.5000 worse", ""],
            ["length_words", "", "3.0000", "", ""],
        ],
    )
    alone = merged({}, sides={"base": {"sari": 40.123}})
    assert results.table(alone) == (["metric", "base"], [["sari", "40.12"]])
