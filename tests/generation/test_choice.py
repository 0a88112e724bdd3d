"""Which token comes next: the penalty, and draws that belong to the question alone."""

from __future__ import annotations

from collections import Counter

import torch

from sft.config.schema import GenerationSection
from sft.generation.decode import Ask, chances, choose


def ask(*prompt: int, chance: bytes = b"") -> Ask:
    return Ask(0, list(prompt), 10, chance, frozenset(prompt))


def test_the_repetition_penalty_counts_prompt_and_answer_but_passes_over_end_tokens() -> None:
    settings = GenerationSection(repetition_penalty=2.0)
    asks = [ask(3, 4), ask(1, 2, 5)]
    asks[1].add(0)
    logits = torch.tensor([[1.5, 1.4, 1.3, 2.0, 2.1, 0.0], [3.0, 2.9, 2.8, 1.6, 1.0, 1.7]])
    assert choose(logits, asks, settings, frozenset({5})) == [0, 5]  # 2.0 and 2.1 are halved; 1.7 is spared
    assert choose(-logits, [ask(5), ask(4)], settings, frozenset()) == [5, 3]  # below zero it is doubled
    assert choose(logits, asks, GenerationSection(), frozenset()) == [4, 0]


def test_draws_follow_the_distribution_that_is_left() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.10]])
    settings = GenerationSection(do_sample=True, temperature=1.0, top_p=1.0, top_k=3)
    one = ask(chance=b"seed")
    drawn = Counter(choose(probabilities.log(), [one], settings, frozenset())[0] for _ in range(4000))
    assert set(drawn) == {0, 1, 2}
    for token, share in enumerate((0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9)):
        assert abs(drawn[token] / 4000 - share) < 0.03
    nucleus = settings.model_copy(update={"top_p": 0.6, "top_k": 0})
    assert {choose(probabilities.log(), [one], nucleus, frozenset())[0] for _ in range(200)} == {0, 1}


def test_a_chance_belongs_to_the_question_and_not_to_its_place() -> None:
    first, second, again = chances([[1, 2], [3], [1, 2]], seed=7)
    assert len({first, second, again}) == 3
    assert chances([[3], [1, 2], [1, 2]], seed=7) == [second, first, again]
    assert first not in chances([[1, 2]], seed=8)
