"""Conversations cut between their turns: every answer is in the loss once, every piece fits, nothing silently lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat import words
from tests.chat.making import answer, in_loss, named, system, user

TALK = [system("Be brief."), user("Who are you?"), answer("Ann."), user("And now?"), answer("Bob."), user("Who?")]
WORDS = st.lists(st.sampled_from(["Ann", "Bob", ".", "you", "are", "now", "/s", "im_end"]), min_size=1, max_size=9)


def made(policy: str, limit: int, name: str = "chatml") -> Any:
    tokenizer = words.tokenizer(eos="<|im_end|>" if name == "chatml" else "</s>")
    return named(name, tokenizer, over_length=policy, max_seq_len=limit)


def exchanges(texts: list[list[str]]) -> list[dict[str, Any]]:
    asked = [[user(f"Who are {' '.join(text[:3])}"), answer(f"{at} {' '.join(text)}")] for at, text in enumerate(texts)]
    return [system("Be brief."), *(message for pair in asked for message in pair)]


def test_a_row_that_fits_is_one_piece_and_other_policies_never_split() -> None:
    row = {"messages": exchanges([["Ann"]] * 4)}
    for policy in ("truncate_left", "truncate_right", "drop"):
        assert len(made(policy, 30).encode_pieces([row])[0]) == 1
    assert len(made("split_turns", 1000).encode_pieces([row])[0]) == 1
    short = {"id": "1", "system": "Be brief.", "user": "Who", "assistant": "Ann " * 40}
    assert len(made("split_turns", 60).encode_pieces([short])[0]) == 1


def test_pieces_begin_with_the_system_text_and_follow_each_other() -> None:
    encoder = made("split_turns", 60)
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
    encoder, whole = made("split_turns", limit), made("drop", 100_000)
    row = {"messages": exchanges(texts)}
    pieces = encoder.encode_pieces([row])[0]
    wanted = in_loss(whole, whole.encode(row))
    kept = [piece for piece in pieces if piece.dropped is None]
    assert all(len(piece.input_ids) <= limit for piece in kept)
    got = [text for piece in kept for text in in_loss(encoder, piece)]
    lost = sum(len(whole.encode({"messages": exchanges([text])}).input_ids) > limit for text in texts)
    if not lost:
        assert got == wanted and not any(piece.truncated_tokens for piece in pieces)
    assert len(got) <= len(wanted) and all(piece.dropped in (None, "over length") for piece in pieces)
    assert set(got) <= set(wanted)  # an answer that stays is whole


@settings(max_examples=25, deadline=None)
@given(
    st.lists(WORDS, min_size=1, max_size=5),
    st.integers(8, 90),
    st.sampled_from(["truncate_left", "truncate_right", "drop", "split_turns"]),
    st.sampled_from(["chatml", "plain", "llama3"]),
)
def test_ends_survive_every_policy_or_the_row_is_named(
    texts: list[list[str]], limit: int, policy: str, name: str
) -> None:
    encoder, whole = made(policy, limit, name), made("drop", 100_000, name)
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


def test_error_names_the_row_and_the_ways_out() -> None:
    with pytest.raises(Exception, match="split_turns"):
        made("error", 20).encode_pieces([{"id": "r", "messages": TALK[:5]}])[0]
