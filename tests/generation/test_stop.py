"""Where an answer ends, token by token and letter by letter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft.generation.engine import LoadedModel
from sft.generation.stop import Answer, IncrementalText, StopCriteria, repeats


@dataclass(frozen=True)
class Stops:
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()


def answering(model: Any, tokenizer: Any, stops: Stops, kind: Any = "causal") -> LoadedModel:
    """The model with these stops and without a template."""
    return LoadedModel(model, tokenizer, SimpleNamespace(stops=stops, prompt=list), kind)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen2: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_qwen2)


def answer(tokenizer: Any, tokens: list[int], stops: Stops) -> Answer:
    return StopCriteria(tokenizer, stops).answer(tokens)


def test_an_answer_ends_before_the_first_end_token_and_nothing_comes_after(tokenizer: Any) -> None:
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = tokenizer.encode("Paris.")
    ended = answer(tokenizer, [*ids, other, *ids, end], Stops(frozenset({end, other})))
    assert (ended.text, ended.ids, ended.stopped, ended.tokens) == ("Paris.", ids, True, len(ids) + 1)
    running = answer(tokenizer, ids, Stops(frozenset({end})))
    assert (running.text, running.stopped, running.tokens) == ("Paris.", False, len(ids))
    assert answer(tokenizer, [end, *ids], Stops(frozenset({end}))).text == ""


def test_an_answer_ends_before_a_stop_string_even_within_a_token(tokenizer: Any) -> None:
    ids = tokenizer.encode("It is Paris.<|user|>And Rome?")
    ended = answer(tokenizer, ids, Stops(strings=("<|user|>", "Rome")))
    assert (ended.text, ended.stopped) == ("It is Paris.", True)
    assert tokenizer.decode(ids[: ended.tokens]).startswith("It is Paris.<|user|>")
    inside = answer(tokenizer, tokenizer.encode("The quick brown fox"), Stops(strings=("ick",)))
    assert inside.text == "The qu"
    assert tokenizer.decode(inside.ids) == "The qu"[: len(tokenizer.decode(inside.ids))]


def test_special_tokens_and_incomplete_characters_are_not_shown(tokenizer: Any) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tick = tokenizer.encode("✓")
    assert len(tick) == 3
    assert answer(tokenizer, [start, *tokenizer.encode("ok "), *tick], Stops()).text == "ok ✓"
    assert answer(tokenizer, [*tokenizer.encode("ok "), *tick[:2]], Stops()).text == "ok "


@pytest.mark.parametrize(("text", "count"), [("Paris", 0), ("Paris.<|us", 4), ("a <", 1), ("<|user", 6), ("", 0)])
def test_a_possible_beginning_of_a_stop_string_is_not_streamed_yet(text: str, count: int) -> None:
    assert StopCriteria(None, Stops(strings=("<|user|>",)), ["###"]).held_back(text) == count


def test_the_end_is_noticed_at_the_token_that_ends_the_answer(tokenizer: Any) -> None:
    for text, strings in [
        ("x Rome### and on", ("###",)), ("the quick fox", ("ick",)), ("one two", (" ",)), ("été ✓ oui", ("✓",)),
        ("a\n\nb", ("\n\n",)), ("no end", ("###", "zzz")),
    ]:  # fmt: skip
        ids = tokenizer.encode(text)
        stop = StopCriteria(tokenizer, Stops(strings=strings))
        ended = [stop.ended(ids[: at + 1]) for at in range(len(ids))]
        decoded = [tokenizer.decode(ids[: at + 1]) for at in range(len(ids))]
        first = next((at for at, seen in enumerate(decoded) if any(string in seen for string in strings)), len(ids))
        assert ended[: first + 1] == [False] * first + [True] * (first < len(ids)), text
    assert StopCriteria(tokenizer, Stops(frozenset({7}))).ended([1, 7])


def test_only_an_exact_repetition_is_a_loop() -> None:
    count = list(range(200))
    assert not repeats(count) and not repeats(count + [7] * 47) and repeats(count + [7] * 48)
    assert not repeats(count + [1, 2, 3, 4, 5] * 9) and repeats(count + [1, 2, 3, 4, 5] * 10)
    assert not repeats(count[:64] * 2 + count[:63]) and repeats(count + count[:64] * 3)
    assert not repeats(count + ([1] * 30 + [2]) * 2) and not repeats(count[:65] * 4)
    stop = StopCriteria(None, Stops(), loops=True)
    lengths = [length for length in range(1, 80) if stop.ended([5] * length)]
    assert lengths == [48, 64]  # looked for after every 16th token
    assert not StopCriteria(None, Stops()).ended([5] * 48)


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_gpt2", "tiny_t5"])
def test_text_that_is_decoded_token_by_token_is_the_text_of_all_tokens(
    family: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(family))
    special = tokenizer.all_special_ids[0]
    draw = random.Random(1)
    for text in ("one  two\n three", "été ✓ 日本 oui", " 3.5 <x> "):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for _ in range(20):
            place = draw.randrange(len(ids) + 1)
            mixed = [*ids[:place], special, *ids[place:]] if draw.random() < 0.5 else ids
            incremental = IncrementalText(tokenizer)
            for token in mixed:
                incremental.add(token)
                assert "�" not in incremental.text
            assert incremental.text == StopCriteria(tokenizer, Stops()).answer(mixed).text
