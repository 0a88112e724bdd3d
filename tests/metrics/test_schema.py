"""Answers that must be JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft.errors import ConfigError
from sft.metrics import scoring
from sft.metrics.scoring import score_rows

SCHEMA = {"type": "object", "required": ["name", "age"], "properties": {"age": {"type": "integer"}}}


def test_only_a_single_complete_json_value_is_valid() -> None:
    texts = ['{"a": 1}', " [1]\n", '"x"', "{'a': 1}", "```json\n{}\n```", "NaN", '{"a": 1, "a": 2}', "", "[" * 100_000]
    got = score_rows(["json_valid"], texts, texts)
    assert got.rows["json_valid"] == [1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_a_schema_is_satisfied_or_not() -> None:
    texts = ['{"name": "Mara", "age": 4}', '{"name": "Mara", "age": "4"}', '{"name": "Mara"}', "Mara"]
    got = score_rows(["json_valid", "json_schema"], texts, texts, json_schema=SCHEMA)
    assert got.means == {"json_valid": 0.75, "json_schema": 0.25}
    with pytest.raises(ConfigError, match="has no schema"):
        score_rows(["json_schema"], ["{}"], ["{}"])


def test_fields_are_scored_one_by_one() -> None:
    reference = '{"name": "Mara", "age": 4, "tags": [1, true]}'
    answers = [reference, '{"tags": [1, 1], "age": 4.0, "name": "Mara"}', "not json", '{"age": 5}']
    got = score_rows(["json_fields"], answers, [reference] * 4)
    assert got.rows["json_fields"] == pytest.approx([1, 2 / 3, 0, 0])
    assert scoring.by_field(answers, [[reference]] * 4) == {"name": 0.5, "age": 0.5, "tags": 0.25}


def test_a_schema_file_is_checked_when_it_is_read(tmp_path: Path) -> None:
    good, broken, wrong = tmp_path / "good.json", tmp_path / "broken.json", tmp_path / "wrong.json"
    good.write_text(json.dumps(SCHEMA))
    broken.write_text("{")
    wrong.write_text('{"type": "thing"}')
    assert scoring.read_schema(good) == SCHEMA
    for path, problem in [
        (broken, "one JSON object"),
        (wrong, "not a JSON schema"),
        (tmp_path / "no", "cannot be"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            scoring.read_schema(path)
