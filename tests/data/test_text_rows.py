"""Texts that a template was put around: which turns come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import DataSection
from sft.data import rows
from sft.data.formats import parse
from sft.data.ledger import RowFault
from sft.data.process import process

ONE = [("user", "Hi"), ("assistant", "Hello!")]
TWO = [("system", "Be brief."), ("user", "Hi\nthere"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye!")]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    "name, text, turns",
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n", ONE),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n"
            "Hello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>",
            TWO,
        ),
        ("chatml", "<|im_start|>user\nQ: 1? A: 2<|im_end|>\n<|im_start|>assistant\n A: x \n<|im_end|>", [
            ("user", "Q: 1? A: 2"), ("assistant", " A: x \n")]),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>",
            ONE,
        ),
        ("gemma", "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n", ONE),
        ("phi3", "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|endoftext|>", ONE),
        ("llama2", "<s>[INST] Hi [/INST] Hello! </s>", ONE),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi\nthere [/INST] Hello! </s><s>[INST] Bye [/INST] Bye! </s>",
            TWO,
        ),
        ("llama2", "<s>[INST] Hi [/INST]Hello!</s>", ONE),
        ("alpaca", ALPACA + "### Instruction:\nHi\n\n### Response:\nHello!</s>", ONE),
        ("alpaca", "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!", [("system", "Be brief."), *ONE]),
        (
            "alpaca",
            "### Instruction:\nHi\n\n### Input:\nthere\n\n### Response:\nHello!",
            [("user", "Hi\n\nthere"), ("assistant", "Hello!")],
        ),
        ("alpaca", "### Instruction:\nHi\n\n### Input:\n\n\n### Response:\nHello!", ONE),
        ("guanaco", "### Human: Hi ### Assistant: Hello!### Human: Bye### Assistant: Bye!", [
            ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye!")]),
        ("guanaco", "### Human: Hi### not a turn\n### Assistant: Hello!", [
            ("user", "Hi### not a turn"), ("assistant", "Hello!")]),
        ("vicuna", VICUNA + " USER: Hi ASSISTANT: Hello!</s>", ONE),
        ("vicuna", "Be brief. USER: Hi\nthere ASSISTANT: Hello!</s> USER: Bye ASSISTANT: Bye!</s>", TWO),
        ("vicuna", "Be brief. USER: Hi\nthere ASSISTANT: Hello!</s>USER: Bye ASSISTANT: Bye!</s>", TWO),
        ("plain", "System: Be brief.\nUser: Hi\nthere\nAssistant: Hello!</s>\nUser: Bye\nAssistant: Bye!</s>", TWO),
        ("plain", "Human: Hi\n\nAssistant: Hello!", ONE),
        ("plain", "<s>System: Be brief.\nUser: Hi\nthere\nAssistant: Hello!</s>\nUser: Bye\nAssistant: Bye!</s>", TWO),
        ("question and answer", "<s>Q: Hi\nA: Hello!</s>", ONE),
        ("question and answer", "Q: Hi\nA: Hello!", ONE),
        ("question and answer", "Question: Hi\nAnswer: Hello!", ONE),
        (
            "question and answer",
            "table: 1\ncolumns: a, b\nQ: which a? \nA: SELECT a FROM 1",
            [("user", "table: 1\ncolumns: a, b\n\nwhich a?"), ("assistant", "SELECT a FROM 1")],
        ),
    ],
)  # fmt: skip
def test_turns_come_back_out_of_their_template(name: str, text: str, turns: list[tuple[str, str]]) -> None:
    found, messages = parse(text)
    assert (found, [(message["role"], message["content"]) for message in messages]) == (name, turns)


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time.",
        "",
        "User: a question that nobody answers",
        "before<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>between<|im_start|>assistant\nHello!<|im_end|>",
    ],
)
def test_a_text_without_a_template_is_a_fault_and_never_a_guess(text: str) -> None:
    with pytest.raises(RowFault, match="unknown format"):
        parse(text)


def test_wikisql_texts_are_read_whole(tmp_path: Path, shared: Path) -> None:
    ledger = process(DataSection(), tmp_path, str(shared / "instruct/wikisql_text.jsonl"))
    assert (ledger.read, ledger.faults, ledger.formats) == (1000, 0, {"text (question and answer)": ledger.written})
    assert ledger.example is not None and ledger.example["assistant"].startswith("SELECT ")


@pytest.mark.parametrize(
    "answers, kept",
    [
        (["a", "b", "a"], ["a", "b"]),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),
        ({"value": "a", "aliases": ["a", "A"]}, ["a", "A"]),
        (["a"], None),
        ("a", None),
    ],
)
def test_of_many_answers_the_first_is_learnt_and_all_are_kept(tmp_path: Path, answers: Any, kept: Any) -> None:
    import json

    raw = tmp_path / "a.jsonl"
    raw.write_text(json.dumps({"question": "q", "answers": answers}) + "\n", encoding="utf-8")
    row = process(DataSection(), tmp_path, str(raw)).example
    assert row is not None and row["assistant"] == "a" and row.get("references") == kept
    assert rows.references(row) == (kept or ["a"])
