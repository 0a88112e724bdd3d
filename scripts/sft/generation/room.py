"""How many tokens a prompt may have: the model's context less the answer; a longer prompt loses its oldest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from sft.config.schema import GenerationSection
from sft.step import unwrap

Kind = Literal["causal", "seq2seq"]


def context(model: nn.Module, kind: Kind) -> int | None:
    """Most tokens of prompt and answer together; None where nothing limits them (T5's positions are relative)."""
    config: Any = unwrap(model).config
    return None if kind == "seq2seq" else getattr(config.get_text_config(), "max_position_embeddings", None)


def prompt_room(model: nn.Module, settings: GenerationSection, kind: Kind, max_len: int | None = None) -> int | None:
    """Most tokens that a prompt may have: the answer gets what it asks for, or half the context; None is no limit."""
    limit = context(model, kind)
    rooms = [] if limit is None else [max(limit - settings.max_new_tokens, limit // 2, 1)]
    return min([*rooms, *([max_len] if max_len else [])], default=None)


def answer_room(model: nn.Module, settings: GenerationSection, kind: Kind, prompt: int) -> int:
    """Most tokens that the answer to a prompt of so many tokens may have."""
    limit = context(model, kind)
    return settings.max_new_tokens if limit is None else max(1, min(settings.max_new_tokens, limit - prompt))


def fit(
    model: nn.Module, prompt: Sequence[int], settings: GenerationSection, kind: Kind, max_len: int | None = None
) -> tuple[list[int], int]:
    """The prompt's newest tokens that there is room for, and how many were cut."""
    room = prompt_room(model, settings, kind, max_len)
    if room is None or len(prompt) <= room:
        return list(prompt), 0
    return list(prompt[-room:]), len(prompt) - room
