"""Masks that transformers computed with trl's Qwen2.5 training template: ids and labels are the same, to the token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.chat.helpers import encoder_for

TEMPLATES = ["auto", "qwen2_5.jinja", "qwen2_5_training.jinja"]


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5")


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[dict[str, Any]]:
    text = (shared / "golden" / "masks_qwen2.5.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_and_labels_are_those_of_the_golden_file(template: str, qwen: Any, rows: list[dict[str, Any]]) -> None:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    encoder = encoder_for(template if template == "auto" else str(folder / template), qwen)
    assert encoder.stops.ids == {151645} and encoder.stops.strings == ()
    newline = 198
    for row, got in zip(rows, encoder.encode_batch(rows), strict=True):
        assert got.input_ids == row["input_ids"] and got.dropped is None
        expected = [
            token if mask == "1" else -100 for token, mask in zip(got.input_ids, row["assistant_masks"], strict=True)
        ]
        for index, (label, expected_label) in enumerate(zip(got.labels, expected, strict=True)):
            trailing = got.input_ids[index] == newline and got.input_ids[index - 1] == 151645
            assert label == expected_label or trailing, (row["index"], index)
    for row, got in zip(rows[:40], encoder.encode_batch(rows[:40]), strict=True):
        prompt = encoder.prompt(row)
        assert got.input_ids[: len(prompt)] == prompt and got.labels[len(prompt)] != -100
