"""Which token comes next: the likeliest, or one drawn from a chance that belongs to the question alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from sft.config.schema import GenerationSection


@dataclass
class Ask:
    """A question under way. prompt, made: token ids. most: tokens it may make. start: its first column in a store.

    chance: what its draws are seeded with. shown: tokens of the prompt that the repetition penalty counts.
    """

    index: int
    prompt: list[int]
    most: int
    chance: bytes
    shown: frozenset[int]
    made: list[int] = field(default_factory=list)
    start: int = 0

    def __post_init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forgets the answer so far."""
        self.made, self.seen, self.draws = [], set(self.shown), random.Random(self.chance)

    def add(self, token: int) -> None:
        """Takes the token into the answer."""
        self.made.append(token)
        self.seen.add(token)


def chances(prompts: Sequence[Sequence[int]], seed: int) -> list[bytes]:
    """What each prompt's draws are seeded with: the seed, its own tokens, and how often it was asked before.

    So a drawn answer depends neither on the batch nor on the order of the questions.
    """
    found: list[bytes] = []
    before = Counter[bytes]()
    for prompt in prompts:
        key = blake2b(b"".join(token.to_bytes(4, "little") for token in prompt)).digest()
        found.append(b"%d %d " % (seed, before[key]) + key)
        before[key] += 1
    return found


def choose(logits: Tensor, asks: Sequence[Ask], settings: GenerationSection, spared: frozenset[int]) -> list[int]:
    """The next token of each ask. logits: [B, V]. spared: tokens that the repetition penalty passes over."""
    scores = logits.float()
    if settings.repetition_penalty != 1.0:
        scores = _penalised(scores, asks, settings.repetition_penalty, spared)
    if not settings.do_sample:
        found: list[int] = scores.argmax(dim=-1).tolist()
        return found
    return _drawn(scores, [ask.draws.random() for ask in asks], settings)


def _penalised(scores: Tensor, asks: Sequence[Ask], penalty: float, spared: frozenset[int]) -> Tensor:
    """The penalty of Keskar et al. 2019 (CTRL), as transformers applies it, but for two things: padding does not count
    as text (so a batch answers as one by one), and end tokens are never made less likely (so answers still stop)."""
    pairs = [(row, token) for row, ask in enumerate(asks) for token in ask.seen - spared]
    if not pairs:
        return scores
    rows, tokens = torch.tensor(pairs, device=scores.device).unbind(1)
    old = scores[rows, tokens]
    return scores.index_put((rows, tokens), torch.where(old < 0, old * penalty, old / penalty))


def _drawn(scores: Tensor, draws: Sequence[float], settings: GenerationSection) -> list[int]:
    """Temperature, top-k and top-p as transformers applies them, then the inverse of the distribution at each draw."""
    from transformers.generation import logits_process as warping

    warpers: list[warping.LogitsProcessor] = [warping.TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        warpers.append(warping.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(warping.TopPLogitsWarper(settings.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    summed = scores.softmax(dim=-1).double().cumsum(dim=-1)
    points = torch.tensor(draws, dtype=torch.double, device=scores.device)[:, None] * summed[:, -1:]
    found: list[int] = torch.searchsorted(summed, points, right=True)[:, 0].clamp(max=scores.shape[1] - 1).tolist()
    return found
