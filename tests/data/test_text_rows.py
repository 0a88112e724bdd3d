"""Texts that a template was put around: which turns come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import DataSection
from sft.data import rows
from sft.data.formats import parse_text
from sft.data.ledger import RowFault
from sft.data.process import process

ONE = [("user", "Hi"), ("assistant", "Hello!")]
TWO = [("system", "Be brief."), ("user", "Hi\nthere"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye!")]


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
        ("phi3", "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n", ONE),
        ("llama2", "[INST] Hi [/INST] Hello!</s>[INST] Bye [/INST] Bye!</s>", [*ONE, *TWO[3:]]),
    ],
)  # fmt: skip
def test_turns_come_back_out_of_their_template(name: str, text: str, turns: list[tuple[str, str]]) -> None:
    found, messages = parse_text(text)
    assert (found, [(message["role"], message["content"]) for message in messages]) == (name, turns)


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time.",
        "",
        "### Instruction:\nHi\n\n### Response:\nHello!",
        "USER: Hi ASSISTANT: Hello!",
        "User: Hi\nAssistant: Hello!",
        "Q: Hi\nA: Hello!",
        "a chat about [INST] and <|im_start|>user\nHi",
        "<|im_start|>user\nHi<|im_start|>assistant\nHello!<|im_end|>",
        "[INST] What does [INST] mean? [/INST] It starts a question.</s>",
        "[INST] Hi [/INST] Write [INST] question [/INST] answer.</s>",
        "before<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>between<|im_start|>assistant\nHello!<|im_end|>",
    ],
)
def test_a_text_without_control_tokens_is_a_fault_and_never_a_guess(text: str) -> None:
    with pytest.raises(RowFault, match="unknown format"):
        parse_text(text)


@pytest.mark.parametrize(
    "answer",
    [
        "Write:\n### Instruction:\nx\n\n### Response:\ny",
        "Assistant: Sure.\nUser: hi",
        "Q: 1\nA: 2",
        "USER: a ASSISTANT: b",
    ],
)
def test_an_answer_that_quotes_another_template_stays_whole(answer: str) -> None:
    text = f"<|im_start|>user\nShow me.<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    assert [message["content"] for message in parse_text(text)[1]] == ["Show me.", answer]
    with pytest.raises(RowFault, match="unknown format"):
        parse_text(f"### Instruction:\nShow me.\n\n### Response:\n{answer}")


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
