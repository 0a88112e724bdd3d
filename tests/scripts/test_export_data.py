"""`export_data` writes rows that the other programs' own loaders read; what they cannot read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import export_data
from sft.errors import DataError

CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}
PLAIN = {"user": "Two and two?", "assistant": "Four."}
ROWS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "system": {"system": "Be brief.", **PLAIN},
    "tools": {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "dry"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": [TOOL],
    },
    "weighted": {
        "messages": [
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "user", "content": "B?"},
            {"role": "assistant", "content": "b"},
        ]
    },
    "rendered": {"input": "<q>A</q>", "target": "b"},
    "pair": {"prompt": "A?", "chosen": "b", "rejected": "c"},
    "rated": {**PLAIN, "label": False},
    "graded": {**PLAIN, "grade": 0.5},
}


def export(root: Path, program: str, *names: str) -> tuple[list[dict[str, Any]], dict[str, Any], Path]:
    """The exported training rows, the command's answer and the file."""
    rows = root / "data/processed/train.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"id": name, **ROWS[name]}) + "\n" for name in names))
    config = root / "config.yaml"
    config.write_text("data: {weight_field: grade}\n")
    arguments = ["--config", str(config), "--to", program]
    result = export_data.main(export_data.build_parser().parse_args(arguments))
    written = root / "data/exported" / program / "train.jsonl"
    return [json.loads(line) for line in written.read_text().splitlines()], result, written


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    return tmp_path


def test_every_shape_has_the_columns_that_the_programs_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = [{"role": "user", "content": "Two and two?"}]
    answer = [{"role": "assistant", "content": "Four."}]
    rows, result, _ = export(root, "trl", *ROWS)
    assert rows[0] == {"messages": [*question, *answer]}
    assert rows[1] == {"messages": [{"role": "system", "content": "Be brief."}, *question, *answer]}
    called, replied = rows[2]["messages"][1:3]
    assert called["tool_calls"] == [{"id": "call_0", **CALL}] and replied["tool_call_id"] == "call_0"
    assert rows[2]["tools"] == [TOOL]
    assert rows[3:] == [
        {"prompt": "<q>A</q>", "completion": "b"},
        {
            "prompt": [{"role": "user", "content": "A?"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
        {"prompt": question, "completion": answer, "label": False},
    ]
    assert (result["rows"], sum(result["left_out"].values())) == ({"train": 6}, 2)
    assert "row graded is left out: its weight (data.weight_field: grade) would not count" in capsys.readouterr().err
    assert [len(export(root, program, *ROWS)[0]) for program in ("nemo", "torchtitan")] == [3, 1]
    with pytest.raises(DataError, match="torchtitan can read no row"):
        export(root, "torchtitan", "pair")


def test_trl_reads_them(root: Path, tiny_qwen2: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    for names in (("plain", "system"), ("pair",), ("rated",), ("rendered",)):
        data = load_dataset("json", data_files=str(export(root, "trl", *names)[2]), split="train", cache_dir=str(root))
        if names != ("rendered",):
            assert trl.is_conversational(data[0])
            data = data.map(lambda row: trl.apply_chat_template(row, tokenizer))
        assert len(data) == len(names) and "Four." in data[0].get("text", "Four.")


def test_nemo_reads_them(root: Path, tiny_qwen2: Path) -> None:
    chat = pytest.importorskip("nemo_automodel.components.datasets.llm.chat_dataset")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    data = chat.ChatDataset(str(export(root, "nemo", "plain", "system", "tools")[2]), tokenizer)
    texts = [tokenizer.decode(data[index]["input_ids"]) for index in range(3)]
    assert "Four." in texts[0] and "Be brief." in texts[1] and "dry" in texts[2]


def test_torchtitan_reads_them(root: Path, tiny_qwen2: Path) -> None:
    text = pytest.importorskip("torchtitan.hf_datasets.text_datasets")
    from datasets import load_dataset
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    file = str(export(root, "torchtitan", "plain")[2])
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(tiny_qwen2))
    tokenizer.set_chat_template((tiny_qwen2 / "chat_template.jinja").read_text())
    rows = load_dataset("json", data_files=file, split="train", cache_dir=str(root))
    data = text.ChatDataset(rows, tokenizer, sample_processor=lambda row: row["messages"], seq_len=32)
    inputs, labels = next(iter(data))
    assert "Four." in tokenizer.decode(inputs["input"].tolist())
    assert "Four." in tokenizer.decode([label for label in labels.tolist() if label >= 0])
