"""Where an answer ends, token by token and letter by letter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sft.generation.stopping import RepetitionPenalty, StopStrings, cut, held_back


@dataclass(frozen=True)
class Ends:
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen2: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_qwen2)


def test_an_answer_ends_before_the_first_end_token_and_nothing_comes_after(tokenizer: Any) -> None:
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = tokenizer.encode("Paris.")
    found = cut(tokenizer, [*ids, other, *ids, end], Ends(frozenset({end, other})))
    assert (found.text, found.ids, found.stopped, found.made) == ("Paris.", ids, True, len(ids) + 1)
    running = cut(tokenizer, ids, Ends(frozenset({end})))
    assert (running.text, running.stopped, running.made) == ("Paris.", False, len(ids))
    assert cut(tokenizer, [end, *ids], Ends(frozenset({end}))).text == ""


def test_an_answer_ends_before_a_stop_string_even_within_a_token(tokenizer: Any) -> None:
    ids = tokenizer.encode("It is Paris.<|user|>And Rome?")
    found = cut(tokenizer, ids, Ends(strings=("<|user|>", "Rome")))
    assert (found.text, found.stopped) == ("It is Paris.", True)
    assert tokenizer.decode(ids[: found.made]).startswith("It is Paris.<|user|>")
    inside = cut(tokenizer, tokenizer.encode("The quick brown fox"), Ends(strings=("ick",)))
    assert inside.text == "The qu"
    assert tokenizer.decode(inside.ids) == "The qu"[: len(tokenizer.decode(inside.ids))]


def test_special_tokens_and_half_characters_leave_no_trace(tokenizer: Any) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tick = tokenizer.encode("✓")
    assert len(tick) == 3
    assert cut(tokenizer, [start, *tokenizer.encode("ok "), *tick], Ends()).text == "ok ✓"
    assert cut(tokenizer, [*tokenizer.encode("ok "), *tick[:2]], Ends()).text == "ok "


@pytest.mark.parametrize(
    ("text", "held"), [("Paris", 0), ("Paris.<|us", 4), ("a <", 1), ("a�", 1), ("<|�", 3), ("<|user", 6), ("", 0)]
)
def test_what_may_be_the_beginning_of_a_stop_string_is_held_back(text: str, held: int) -> None:
    assert held_back(text, ("<|user|>", "###")) == held


def test_rows_of_a_batch_stop_each_for_itself(tokenizer: Any) -> None:
    rows = [tokenizer.encode("x Rome y" + tail)[-8:] for tail in ("### ", "abc ", "##  ")]
    length = min(map(len, rows))
    ids = torch.tensor([row[-length:] for row in rows])
    stopper = StopStrings(tokenizer, Ends(strings=("###",)), start=0)
    assert stopper(ids, None).tolist() == [True, False, False]
    assert stopper(torch.cat([ids, ids[:, :1] * 0 + 65], dim=1), None).tolist() == [True, False, False]
    prompt_only = StopStrings(tokenizer, Ends(strings=("Rome",)), start=length)
    assert prompt_only(torch.cat([ids, ids[:, :1]], dim=1), None).tolist() == [False, False, False]


def test_the_repetition_penalty_passes_over_padding_and_end_tokens() -> None:
    ids = torch.tensor([[0, 0, 3, 4], [1, 2, 3, 5]])
    padding = torch.tensor([[True, True, False], [False, False, False]])
    scores = torch.full((2, 6), 2.0)
    scores[:, 4] = -2.0
    got = RepetitionPenalty(2.0, padding, frozenset({5}))(ids, scores)
    assert got.tolist() == [[2, 2, 2, 1, -4, 2], [2, 1, 1, 1, -2, 2]]
