"""Encoder-decoder rows: source and target, each with its end token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft.chat.loss_mask import NO_LABEL, OVER_LENGTH
from sft.errors import DataError
from tests.chat.helpers import answer, encode, encoder_for, system, user

END = "</s>"


@pytest.fixture(scope="module")
def tokenizer(tiny_t5: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_t5)


def test_source_and_target_end_with_the_end_token(tokenizer: Any) -> None:
    encoder = encoder_for("auto", tokenizer, kind="seq2seq")
    row = encode(encoder, system("You are a helpful assistant."), user("What is the capital?"), answer(" Paris. "))
    assert row.input_ids == tokenizer("You are a helpful assistant.\nWhat is the capital?")["input_ids"]
    assert row.labels == tokenizer("Paris.")["input_ids"]
    assert row.input_ids[-1] == row.labels[-1] == tokenizer.eos_token_id
    assert encoder.prompt([user("What is the capital?")]) == tokenizer("What is the capital?")["input_ids"]
    assert encoder.stops.ids == {tokenizer.eos_token_id}


def test_earlier_turns_have_role_prefixes_and_a_named_template_is_used(tokenizer: Any) -> None:
    encoder = encoder_for("auto", tokenizer, kind="seq2seq")
    row = encode(encoder, user("a"), answer("b"), user("c"), answer("d"))
    assert row.text == "User: a\nAssistant: b\nUser: c\nd"
    plain = encoder_for("vicuna", tokenizer, kind="seq2seq")
    assert encode(plain, system("Be brief."), user("a"), answer("b")).text == "Be brief. USER: a ASSISTANT:\nb"


def test_rendered_rows_and_control_text(tokenizer: Any) -> None:
    encoder = encoder_for("auto", tokenizer, kind="seq2seq")
    row = encoder.encode({"input": "lazy dog", "target": "fox"})
    assert row.input_ids == tokenizer("lazy dog")["input_ids"] and row.labels == tokenizer("fox")["input_ids"]
    assert encoder.split({"user": "a", "assistant": "b"}) == {"input": "a", "target": "b"}
    assert encode(encoder, user("a</s>b"), answer("c")).input_ids.count(tokenizer.eos_token_id) <= 2
    assert encode(encoder, user("a"), {**answer("c"), "weight": 0}).dropped == NO_LABEL
    assert set(encode(encoder, user("a"), {**answer("c"), "weight": 0.5}).weights) == {0.5}


def test_source_and_target_are_cut_by_the_policy(tokenizer: Any) -> None:
    long, short = user("the quick brown fox jumps over the lazy dog " * 9), answer("fox")
    whole = encode(encoder_for("auto", tokenizer, kind="seq2seq"), long, short)
    left = encode(
        encoder_for("auto", tokenizer, kind="seq2seq", max_seq_len=20, over_length="truncate_left"), long, short
    )
    assert left.input_ids == whole.input_ids[-20:] and left.truncated_tokens == len(whole.input_ids) - 20
    right = encoder_for("auto", tokenizer, kind="seq2seq", max_seq_len=20, over_length="truncate_right")
    got = encode(right, long, answer(long["content"]))
    assert got.input_ids == [*whole.input_ids[:19], tokenizer.eos_token_id]
    assert len(got.labels) == 20 and got.labels[-1] == tokenizer.eos_token_id
    for policy in ("drop", "truncate_left"):
        encoder = encoder_for("auto", tokenizer, kind="seq2seq", max_seq_len=20, over_length=policy)
        assert encode(encoder, user("a"), answer(long["content"])).dropped == OVER_LENGTH
    with pytest.raises(DataError, match="a side"):
        encode(encoder_for("auto", tokenizer, kind="seq2seq", max_seq_len=20, over_length="error"), long, short)


def test_plain_text_is_split_into_source_and_target(tokenizer: Any) -> None:
    text = "Once upon a time there was a king. " * 6
    ids = tokenizer(text.strip())["input_ids"]
    words, end = ids[:-1], ids[-1:]
    row = {"id": "r", "input": "", "target": text, "replay": True}
    whole = encoder_for("auto", tokenizer, kind="seq2seq").encode(row)
    half = len(words) // 2
    assert (whole.input_ids, whole.labels) == (words[:half] + end, words[half:] + end) and whole.dropped is None
    cut = encoder_for("auto", tokenizer, kind="seq2seq", max_seq_len=9, over_length="truncate_left").encode(row)
    assert (cut.input_ids, cut.labels) == (words[-16:-8] + end, words[-8:] + end)
    assert cut.truncated_tokens == len(words) - 16
