"""What ends an answer: every end-of-turn token of the template, the model's end tokens, texts that open a turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft.chat.facts import Facts
from sft.chat.tokens import Tokens
from sft.chat.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Stops:
    """Generation stops at any of these token ids, or once the text holds any of these strings."""

    ids: frozenset[int]
    strings: tuple[str, ...]


def find(
    facts: Facts, tokens: Tokens, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, more: Iterable[int]
) -> Stops:
    """Stops of a template. more: the end tokens that the model's generation_config names."""
    ids = {int(token) for token in more}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    strings: list[str] = []
    for end in facts.ends:
        token = tokens.ids(end.strip())[-1]
        if token in vocabulary.texts:
            ids.add(token)
        else:
            strings.append(end.strip())
    return Stops(frozenset(ids), tuple(dict.fromkeys([*strings, *_header(facts, vocabulary)])))


def _header(facts: Facts, vocabulary: Vocabulary) -> list[str]:
    """The plain text that opens the next user's turn, where no control token does.

    A line of its own or a piece of markup is a stop; a bare word (`USER:`) only where no token ends the turn, since it
    may stand in an answer.
    """
    header = facts.header.lstrip(" ").rstrip()
    words = header.strip()
    if not words or vocabulary.opening(words, but=""):
        return []
    marked = words[0] in "<[#|" or header.startswith("\n")
    ended = any(vocabulary.holds_control(end) for end in facts.ends)
    return [header if header.startswith("\n") and words[0] not in "<[" else words] if marked or not ended else []
