"""Where an answer ends, token by token and letter by letter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft.generation.stop import StopWatcher, cut, held_back


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


def test_an_answer_under_way_is_watched_token_by_token(tokenizer: Any) -> None:
    for text, strings in [
        ("x Rome### and on", ("###",)), ("the quick fox", ("ick",)), ("one two", (" ",)), ("été ✓ oui", ("✓",)),
        ("a\n\nb", ("\n\n",)), ("no end", ("###", "zzz")),
    ]:  # fmt: skip
        ids = tokenizer.encode(text)
        watcher = StopWatcher(tokenizer, Ends(strings=strings))
        ended = [watcher.ended(ids[: at + 1]) for at in range(len(ids))]
        decoded = [tokenizer.decode(ids[: at + 1]) for at in range(len(ids))]
        first = next((at for at, said in enumerate(decoded) if any(string in said for string in strings)), len(ids))
        assert ended[: first + 1] == [False] * first + [True] * (first < len(ids)), text
    assert StopWatcher(tokenizer, Ends(frozenset({7}))).ended([1, 7])
