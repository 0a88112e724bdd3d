"""Answers by transformers' own `generate`, for families that our loop is not proven on.

The library runs the model and keeps its cache; which token comes next and where an answer ends is decided as in our
loop, so that both give the same answers, drawn ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sft.config.schema import GenerationSection
from sft.generation.choice import Ask, choose
from sft.generation.room import Kind
from sft.generation.stopping import Watcher
from sft.step import unwrap


def generate(
    model: nn.Module,
    asks: Sequence[Ask],
    settings: GenerationSection,
    watcher: Watcher,
    *,
    pad: int,
    kind: Kind,
    device: torch.device,
    on_tokens: Callable[[list[int]], bool] = lambda tokens: True,
) -> None:
    """One batch through the model; each ask's `made` then holds its answer, its end included.

    on_tokens: told the tokens of each step; false ends the batch.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    base: Any = unwrap(model)
    ids, mask = _padded([ask.prompt or [pad] for ask in asks], pad, kind, device)
    over = [False] * len(asks)

    def choose_next(_: Tensor, scores: Tensor) -> Tensor:
        tokens = choose(scores, asks, settings, watcher.ids)
        for row, (ask, token) in enumerate(zip(asks, tokens, strict=True)):
            if not over[row]:
                ask.add(token)
                over[row] = len(ask.made) >= ask.most or watcher.ended(ask.made)
        if not on_tokens(tokens):
            over[:] = [True] * len(over)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def is_over(*_: Any, **__: Any) -> Tensor:
        return torch.tensor(over, device=device)

    base.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=max(ask.most for ask in asks),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            decoder_start_token_id=base.generation_config.decoder_start_token_id,
        ),
        logits_processor=LogitsProcessorList([choose_next]),
        stopping_criteria=StoppingCriteriaList([is_over]),
    )


def _padded(prompts: list[list[int]], pad: int, kind: Kind, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, P]: padded on the left, so that every answer starts in the same column (encoders: right)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if kind == "seq2seq" else slice(longest - len(prompt), longest)
        ids[row, where] = torch.tensor(prompt)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)
