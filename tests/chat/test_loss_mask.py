"""Rows over max_seq_len: what is cut is counted, the answer's end token survives or the row is dropped and named."""

from __future__ import annotations

from typing import Any

import pytest

from sft.chat.preview import headline
from sft.errors import DataError
from tests.chat import words
from tests.chat.helpers import answer, encode, encoder_for, in_loss, user

TALK = [user("Who are you?"), answer("Ann. Bob."), user("And now?"), answer("Bob. Ann.")]
# <s> User : _ Who _ are _ you ? /n Assistant : | _ Ann . _ Bob . </s> | /n User : _ And _ now ? /n Assistant : | _ Bob
# . _ Ann . </s> | /n          13 + 7 + 11 + 7 + 1 = 39 tokens


def row(policy: str, limit: int, *talk: dict[str, Any]) -> tuple[Any, Any]:
    encoder = encoder_for("plain", words.tokenizer(), over_length=policy, max_seq_len=limit)
    return encoder, encode(encoder, *(talk or TALK))


def test_a_row_that_fits_is_unchanged() -> None:
    for policy in ("truncate_left", "truncate_right", "drop", "error"):
        _, got = row(policy, 39)
        assert (len(got.input_ids), got.truncated_tokens, got.dropped) == (39, 0, None)


def test_truncate_left_cuts_the_oldest_tokens_and_keeps_the_begin_token_and_the_last_answer() -> None:
    _, whole = row("drop", 39)
    encoder, got = row("truncate_left", 15)
    assert got.input_ids == whole.input_ids[:1] + whole.input_ids[25:]
    assert got.labels == whole.labels[:1] + whole.labels[25:]
    assert (got.truncated_tokens, got.dropped) == (24, None)
    assert in_loss(encoder, got) == [" Bob. Ann.</s>"]
    encoder, got = row("truncate_left", 24)
    assert in_loss(encoder, got) == ["Bob.</s>"[3:], " Bob. Ann.</s>"] or in_loss(encoder, got)[-1] == " Bob. Ann.</s>"


def test_the_weights_of_turns_and_of_the_row_multiply_and_are_cut_with_the_labels() -> None:
    talk = [TALK[0], {**TALK[1], "weight": 0.5}, *TALK[2:]]
    for policy, limit, expected in (
        ("drop", 39, [3.0] * 13 + [1.5] * 7 + [3.0] * 19),
        ("truncate_left", 24, [3.0] + [1.5] * 4 + [3.0] * 19),
        ("truncate_right", 35, [3.0] * 13 + [1.5] * 7 + [3.0] * 15),
    ):
        encoder = encoder_for("plain", words.tokenizer(), over_length=policy, max_seq_len=limit, weight_field="grade")
        got = encoder.encode({"messages": talk, "grade": 3})
        assert got.weights == expected and len(got.labels) == limit and got.row_weight == 3
    whole = encoder_for("plain", words.tokenizer(), weight_field="grade").encode({"messages": talk, "grade": 3})
    assert headline(whole).endswith(": 39 tokens, 14 in the loss with weight 1.5 and 3")
    assert row("drop", 39)[1].weights is None
    assert encode(encoder, *TALK).weights is None
    assert encoder.encode({"messages": TALK, "grade": 0}).dropped == "its weight is 0"
    with pytest.raises(DataError, match='grade is "x", not a number from 0 on'):
        encoder.encode({"messages": TALK, "grade": "x"})
    pieces = encoder_for("plain", words.tokenizer(), over_length="split_turns", max_seq_len=30, weight_field="grade")
    (parts,) = pieces.encode_pieces([{"messages": talk, "grade": 3}])
    counted = [zip(part.weights, part.labels, strict=True) for part in parts]
    assert [{weight for weight, label in pairs if label != -100} for pairs in counted] == [{1.5}, {3.0}]


def test_truncate_left_cuts_the_newline_after_the_answer_first() -> None:
    _, whole = row("drop", 39)
    encoder, got = row("truncate_left", 9)  # begin token, one token of the prompt, seven of the answer
    assert got.input_ids == whole.input_ids[:1] + whole.input_ids[30:38]
    assert in_loss(encoder, got) == [" Bob. Ann.</s>"] and got.truncated_tokens == 30


def test_an_answer_that_is_too_long_by_itself_is_dropped_and_named() -> None:
    _, got = row("truncate_left", 8)
    assert (got.dropped, got.truncated_tokens) == ("over length", 0)


def test_truncate_right_ends_with_the_end_token_of_the_answer_it_cuts() -> None:
    _, whole = row("drop", 39)
    encoder, got = row("truncate_right", 35)
    assert got.input_ids == [*whole.input_ids[:34], words.ID["</s>"]]
    assert in_loss(encoder, got) == [" Ann. Bob.</s>", " Bob.</s>"] and got.truncated_tokens == 4
    encoder, got = row("truncate_right", 25)
    assert got.input_ids == whole.input_ids[:25] and in_loss(encoder, got) == [" Ann. Bob.</s>"]


def test_truncate_right_drops_a_row_without_a_label_left() -> None:
    for limit in (9, 13, 14):
        _, got = row("truncate_right", limit)
        assert got.dropped == "no label left", limit
    encoder, got = row("truncate_right", 15)
    assert in_loss(encoder, got) == [" </s>"]


def test_drop_and_error() -> None:
    _, got = row("drop", 38)
    assert got.dropped == "over length" and len(got.input_ids) == 39
    with pytest.raises(DataError, match=r"39 tokens, more than model\.max_seq_len 38"):
        row("error", 38)


def test_the_end_token_survives_every_cut() -> None:
    for policy in ("truncate_left", "truncate_right"):
        for limit in range(2, 40):
            encoder, got = row(policy, limit)
            if got.dropped:
                continue
            assert len(got.input_ids) <= limit and len(got.labels) == len(got.input_ids)
            assert got.truncated_tokens == 39 - len(got.input_ids)
            assert all(stretch.endswith("</s>") for stretch in in_loss(encoder, got))


def test_plain_text_loses_its_oldest_tokens() -> None:
    plain = {"id": "r", "input": "", "target": "Who are you? " * 9}
    whole = encoder_for("plain", words.tokenizer(), max_seq_len=10_000).encode(plain)
    got = encoder_for("plain", words.tokenizer(), over_length="truncate_left", max_seq_len=20).encode(plain)
    assert got.input_ids == whole.input_ids[-20:] and got.labels == whole.labels[-20:] and got.dropped is None
    assert got.truncated_tokens == len(whole.input_ids) - 20
