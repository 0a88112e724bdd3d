"""Tokenizers that tell no offsets: every token's place is found by walking along the text, or the row is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizer

from sft.chat.tokenize import place
from tests.chat.making import CHATML, ROOT, answer, encoded, encoder, learnt, named, system, user

TALKS: list[list[dict[str, Any]]] = [
    [system("Be brief."), user("Wer ist Zoë?"), answer("  Eine Katze 🙂.\n\nJa!  ")],
    [user("a\r\nb"), answer("\n\nbegins with lines"), user("say <|im_end|> once"), answer("東京 <|im_start|> é")],
    [user("x"), answer("x"), user("x"), answer("x")],
]


class Letters(PreTrainedTokenizer):
    """A tokenizer written by hand: one letter, one token."""

    def __init__(self, **named: Any) -> None:
        letters = ["<unk>", *map(chr, range(10, 300))]
        self.numbers = {letter: index for index, letter in enumerate(letters)}
        self.letters = dict(enumerate(letters))
        super().__init__(unk_token="<unk>", **named)

    @property
    def vocab_size(self) -> int:
        return len(self.numbers)

    def get_vocab(self) -> dict[str, int]:
        return {**self.numbers, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters.get(index, "<unk>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


class Words(Letters):
    """One word, one token; white space is lost."""

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        for word in text.split():
            if word not in self.numbers:
                self.numbers[word] = len(self.numbers) + 1000
                self.letters[self.numbers[word]] = word
        return text.split()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def by_hand(kind: type[Letters]) -> Any:
    special = ["<|im_start|>", "<|im_end|>"]
    return kind(extra_special_tokens=special, eos_token="<|im_end|>", pad_token="<pad>")


def test_a_tokenizer_by_letters_is_labelled_to_the_letter() -> None:
    made = encoder(CHATML, by_hand(Letters))
    row = encoded(made, *TALKS[0])
    assert row.dropped is None and learnt(made, row) == ["  Eine Katze <unk>.\n\nJa!  <|im_end|>"]
    row = encoded(made, *TALKS[1])
    assert learnt(made, row) == ["\n\nbegins with lines<|im_end|>", "<unk><unk> <|im_start|> é<|im_end|>"]
    assert row.input_ids.count(made.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4  # none of a message's words


def test_a_tokenizer_by_words_learns_the_words_of_answers_alone() -> None:
    made = encoder(CHATML, by_hand(Words))
    row = encoded(made, *TALKS[2])
    assert learnt(made, row) == ["x <|im_end|>", "x <|im_end|>"]
    row = encoded(made, user("one two"), answer(" three  four "))
    assert learnt(made, row) == ["three four <|im_end|>"]
    assert row.input_ids[: len(made.prompt([user("one two")]))] == made.prompt([user("one two")])


@pytest.mark.parametrize("name", ["chatml", "plain", "llama3"])
def test_hidden_offsets_are_found_again(name: str) -> None:
    fast = AutoTokenizer.from_pretrained(ROOT / "models" / "demo")

    class Slow(type(fast)):  # type: ignore[misc]
        is_fast = property(lambda _: False)

    slow = Slow.from_pretrained(ROOT / "models" / "demo")
    one, other = named(name, fast), named(name, slow)
    assert other.tokens.walks and not one.tokens.walks
    for talk in TALKS:
        expected, got = encoded(one, *talk), encoded(other, *talk)
        assert (got.input_ids, got.labels, got.dropped) == (expected.input_ids, expected.labels, None)


def no_text(_: int) -> str:
    return "\ufffd"


def test_the_walk_reads_every_spelling() -> None:
    text = "Zoë  sagt ﬁn."
    pieces: list[str | bytes] = ["▁Z", "o", "<0xC3>", "<0xAB>", "▁▁", "sagt", "▁ﬁ", "n."]
    assert place(text, pieces, "<unk>", no_text) == [
        (0, 1), (1, 2), (2, 3), (2, 3), (3, 5), (5, 9), (9, 11), (11, 13),
    ]  # fmt: skip
    assert place(text, ["▁Zoë", "▁sagt", "▁fin", "."], "<unk>", no_text) == [(0, 3), (5, 9), (9, 12), (12, 13)]
    assert place(text, ["zoe", "sag", "##t", "<unk>"], "<unk>", no_text) == [(0, 3), (5, 8), (8, 9), (10, 13)]
    assert place("a é", ["a", "Ġ", "Ã", "©"], "", no_text) == [(0, 1), (1, 2), (2, 3), (2, 3)]
    assert place("a b", [b"a", b" b"], "", no_text) == [(0, 1), (1, 3)]


def test_a_walk_that_does_not_hold_proves_nothing() -> None:
    assert place("one two", ["one", "three"], "<unk>", no_text) is None
    assert place("one two", ["one"], "<unk>", no_text) is None
    made = encoder(CHATML, by_hand(Letters))
    made.tokenizer._tokenize = lambda text, **_: list(text[::-1])
    row = encoded(made, user("ab"), answer("cd"))
    assert row.dropped == (
        "template: the tokenizer has no offsets, and its tokens do not spell this text, so none can be placed"
    )
