"""How many tokens a prompt may have: the model's context less the answer; a longer prompt loses its oldest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from sft.chat.encode import Encoder
from sft.config.schema import GenerationSection
from sft.data import records
from sft.step import unwrap

log = logging.getLogger("sft.generation")
Kind = Literal["causal", "seq2seq"]
Message = dict[str, Any]


def context(model: nn.Module, kind: Kind) -> int | None:
    """Most tokens of prompt and answer together; None where nothing limits them (T5's positions are relative)."""
    config: Any = unwrap(model).config
    return None if kind == "seq2seq" else getattr(config.get_text_config(), "max_position_embeddings", None)


def prompt_room(model: nn.Module, settings: GenerationSection, kind: Kind) -> int | None:
    """Most tokens that a prompt may have: the answer gets what it asks for, or half the context; None is no limit."""
    limit = context(model, kind)
    return None if limit is None else max(limit - settings.max_new_tokens, limit // 2, 1)


def answer_room(model: nn.Module, settings: GenerationSection, kind: Kind, prompt: int) -> int:
    """Most tokens that the answer to a prompt of so many tokens may have."""
    limit = context(model, kind)
    return settings.max_new_tokens if limit is None else max(1, min(settings.max_new_tokens, limit - prompt))


def fitted(encoder: Encoder, row: records.Row | list[Message], room: int | None) -> tuple[list[int], int]:
    """The ids of a row's or a conversation's prompt, and how many of its oldest turns were left out for the room.

    The system text and the newest turn always stay; if that alone is too long, the engine cuts its oldest tokens.
    """
    ids, lost = encoder.prompt(row), 0
    if isinstance(row, dict) and records.is_rendered(row):
        return ids, 0
    messages = row if isinstance(row, list) else records.messages(row)
    tools = None if isinstance(row, list) else records.tools(row)
    while room is not None and len(ids) > room and (shorter := _without_oldest_turn(messages)) is not None:
        messages, lost = shorter, lost + 1
        ids = encoder.prompt({"messages": messages, "tools": tools} if tools else messages)
    return ids, lost


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The conversation without its oldest question and what followed it; None when only one question is left."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    return [*messages[: questions[0]], *messages[questions[1] :]]


def say_lost(lost: Sequence[int], what: str) -> None:
    """Says how many prompts were too long and how many `what` (turns, tokens) they lost, where any did."""
    if short := [count for count in lost if count]:
        log.warning("%d prompts are too long for the model: they lost their oldest %d %s", len(short), sum(short), what)


def fit(model: nn.Module, prompt: Sequence[int], settings: GenerationSection, kind: Kind) -> tuple[list[int], int]:
    """The prompt's newest tokens that there is room for, and how many were cut."""
    room = prompt_room(model, settings, kind)
    if room is None or len(prompt) <= room:
        return list(prompt), 0
    return list(prompt[-room:]), len(prompt) - room
