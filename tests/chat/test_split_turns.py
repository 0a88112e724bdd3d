"""Conversations split between turns: every answer is in the loss once, every piece fits, dropped ones are named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat import words
from tests.chat.helpers import answer, encoder_for, in_loss, system, user

TALK = [system("Be brief."), user("Who are you?"), answer("Ann."), user("And now?"), answer("Bob."), user("Who?")]
WORDS = st.lists(st.sampled_from(["Ann", "Bob", ".", "you", "are", "now", "/s", "im_end"]), min_size=1, max_size=9)


def encoder_with(policy: str, limit: int, name: str = "chatml") -> Any:
    tokenizer = words.tokenizer(eos="<|im_end|>" if name == "chatml" else "</s>")
    return encoder_for(name, tokenizer, over_length=policy, max_seq_len=limit)


def exchanges(texts: list[list[str]]) -> list[dict[str, Any]]:
    pairs = [[user(f"Who are {' '.join(text[:3])}"), answer(f"{at} {' '.join(text)}")] for at, text in enumerate(texts)]
    return [system("Be brief."), *(message for pair in pairs for message in pair)]


def test_a_row_that_fits_is_one_piece_and_other_policies_never_split() -> None:
    row = {"messages": exchanges([["Ann"]] * 4)}
    for policy in ("truncate_left", "truncate_right", "drop"):
        assert len(encoder_with(policy, 30).encode_pieces([row])[0]) == 1
    assert len(encoder_with("split_turns", 1000).encode_pieces([row])[0]) == 1
    short = {"id": "1", "system": "Be brief.", "user": "Who", "assistant": "Ann " * 40}
    assert len(encoder_with("split_turns", 60).encode_pieces([short])[0]) == 1


def test_pieces_begin_with_the_system_text_and_follow_each_other() -> None:
    encoder = encoder_with("split_turns", 60)
    pieces = encoder.encode_pieces([{"id": "r", "messages": exchanges([["Ann"], ["Bob"], ["now"], ["you"]])}])[0]
    assert len(pieces) > 1 and {piece.id for piece in pieces} == {"r"}
    assert all(
        piece.text.startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user") for piece in pieces
    )
    shown = [text for piece in pieces for text in in_loss(encoder, piece)]
    assert [text.split()[1] for text in shown] == ["Ann<|im_end|>", "Bob<|im_end|>", "now<|im_end|>", "you<|im_end|>"]


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=7), st.integers(30, 120))
def test_every_answer_is_in_the_loss_once_and_every_piece_fits(texts: list[list[str]], limit: int) -> None:
    encoder, whole = encoder_with("split_turns", limit), encoder_with("drop", 100_000)
    row = {"messages": exchanges(texts)}
    pieces = encoder.encode_pieces([row])[0]
    expected = in_loss(whole, whole.encode(row))
    trained = [piece for piece in pieces if piece.dropped is None]
    assert all(len(piece.input_ids) <= limit for piece in trained)
    got = [text for piece in trained for text in in_loss(encoder, piece)]
    lost = sum(len(whole.encode({"messages": exchanges([text])}).input_ids) > limit for text in texts)
    if not lost:
        assert got == expected and not any(piece.truncated_tokens for piece in pieces)
    assert len(got) <= len(expected) and all(piece.dropped in (None, "over length") for piece in pieces)
    assert set(got) <= set(expected)  # an answer that stays is whole


@settings(max_examples=25, deadline=None)
@given(
    st.lists(WORDS, min_size=1, max_size=5),
    st.integers(8, 90),
    st.sampled_from(["truncate_left", "truncate_right", "drop", "split_turns"]),
    st.sampled_from(["chatml", "plain", "llama3"]),
)
def test_end_tokens_survive_every_policy_or_the_row_is_dropped_with_its_reason(
    texts: list[list[str]], limit: int, policy: str, name: str
) -> None:
    encoder, whole = encoder_with(policy, limit, name), encoder_with("drop", 100_000, name)
    row = {"messages": exchanges(texts)}
    full = whole.encode(row)
    for piece in encoder.encode_pieces([row])[0]:
        if piece.dropped is not None:
            assert piece.dropped in ("over length", "no label left")
            continue
        assert len(piece.input_ids) == len(piece.labels) <= limit
        ends = tuple(encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.stops.ids)))
        assert all(text.endswith(ends) for text in in_loss(encoder, piece))
        if policy != "split_turns":
            assert piece.truncated_tokens == len(full.input_ids) - len(piece.input_ids)


def test_error_names_the_row_and_the_other_policies() -> None:
    with pytest.raises(Exception, match="split_turns"):
        encoder_with("error", 20).encode_pieces([{"id": "r", "messages": TALK[:5]}])[0]
