"""Our decode loop against transformers' own `generate` on a tiny model of every proven family, and the token choice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from sft.config.schema import GenerationSection
from sft.generation import decode
from sft.generation.decode import Decoder, DecodingSequence, choose_tokens, seeds, shared_prefix
from sft.generation.stop import StopCriteria
from sft.model import hardware
from tests.generation.test_stop import Stops

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "head_dim": 8,
}  # fmt: skip
WINDOWED = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "gemma2": {**WINDOWED, "final_logit_softcapping": 20.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 8},
    "qwen2": {**WINDOWED, "use_sliding_window": True},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48},
    "starcoder2": {"sliding_window": 12},
    "smollm3": {"no_rope_layer_interval": 2},
}
GREEDY = GenerationSection(max_new_tokens=30)


def tiny(family: str, attention: str = "sdpa", **more: Any) -> Any:
    torch.manual_seed(3)
    sizes = {
        k: v
        for k, v in (SIZES | more).items()
        if family != "gpt2" or not k.startswith(("hidden", "inter", "num", "max"))
    }
    config = AutoConfig.for_model(family, **{**sizes, **OWN.get(family, {})})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def questions(count: int = 11, *, alike: int = 10) -> list[list[int]]:
    draw = random.Random(5)
    start = [draw.randrange(1, 96) for _ in range(alike)]
    return [start + [draw.randrange(1, 96) for _ in range(draw.choice((1, 3, 8, 20, 33)))] for _ in range(count)]


def alone(model: Any, prompt: list[int], most: int) -> list[int]:
    tokens = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=most, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    answer: list[int] = tokens[0, len(prompt) :].tolist()
    return answer


def max_tokens(index: int, most: int) -> int:
    """Rows that end at different times, so that others get their places."""
    return most - 3 * (index % 4)


def until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    first = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def ours(
    model: Any, prompts: list[list[int]], settings: GenerationSection, rows: int, ends: frozenset[int] = frozenset()
) -> list[list[int]]:
    sequences = [
        DecodingSequence(index, prompt, max_tokens(index, settings.max_new_tokens), seed, frozenset(prompt))
        for index, (prompt, seed) in enumerate(zip(prompts, seeds(prompts, settings.seed), strict=True))
    ]
    stop = StopCriteria(None, Stops(ends))
    decoder = Decoder(model, sequences, settings, stop, rows=rows, device=torch.device("cpu"))
    done = [sequence.index for advanced in decoder.steps() for sequence in advanced if sequence.done]
    assert sorted(done) == list(range(len(prompts)))
    return [sequence.tokens for sequence in sequences]


QUICK = {"qwen2", "gemma2", "gpt2", "phi3"}


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(decode.PROVEN)],
)
def test_every_proven_family_answers_as_transformers_does_prompt_by_prompt(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SPARE_COLUMNS", 1)  # so that the cache is shifted on the way
    shifts = counted(monkeypatch, decode.KVCache, "shift")
    model, prompts = tiny(family, "eager" if family == "gemma2" else "sdpa"), questions()
    assert decode.supports(model)
    free = [alone(model, prompt, 30) for prompt in prompts]
    ends = frozenset({free[0][12], free[1][20]} | {tokens[-1] for tokens in free[4:6]})
    expected = [until_end(tokens[: max_tokens(index, 30)], ends) for index, tokens in enumerate(free)]
    assert len({len(tokens) for tokens in expected}) > 2
    assert shared_prefix(prompts) == 10
    for rows in (1, 3, 20):
        assert ours(model, prompts, GREEDY, rows, ends) == expected
    distinct = questions(alike=0)
    free = [alone(model, prompt, 30)[: max_tokens(index, 30)] for index, prompt in enumerate(distinct)]
    assert ours(model, distinct, GREEDY, 4) == free
    assert shifts


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    calls: list[int] = []
    real: Callable[..., Any] = getattr(owner, name)

    def counting(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_reading_prompts_does_not_copy_the_head() -> None:
    """A frozen bf16 head on a CPU would be copied for every row: 1.7 GiB for 32 prompts of a 135M model."""
    model = tiny("llama", vocab_size=8192).bfloat16().requires_grad_(False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        ours(model, questions(), GREEDY, 8)
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    assert 0 < largest <= model.get_output_embeddings().weight.nbytes


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    model, prompts = tiny("llama"), questions()
    drawn = GenerationSection(max_new_tokens=20, do_sample=True, temperature=1.2, top_k=0, top_p=0.95, seed=3)
    answers = ours(model, prompts, drawn, 1)
    assert ours(model, prompts, drawn, 4) == ours(model, prompts, drawn, 20) == answers
    unequal = ours(model, prompts[::-1], drawn, 4)[::-1]
    assert all(a[: len(b)] == b[: len(a)] for a, b in zip(unequal, answers, strict=True))
    assert ours(model, prompts, drawn.model_copy(update={"seed": 4}), 4) != answers


def test_the_shared_prefix_of_prompts() -> None:
    assert shared_prefix([[1] * 9 + [2], [1] * 9 + [3], [1] * 12]) == 9
    assert shared_prefix([[1] * 9, [1] * 12]) == 8  # a token of each is left over, to be answered
    assert shared_prefix([[1] * 7 + [2, 3], [1] * 12]) == 0
    assert shared_prefix([[1] * 30]) == 0


def test_another_class_or_a_patched_forward_is_not_decoded_by_our_loop() -> None:
    model = tiny("qwen2")
    model.config.model_type = "qwen2_special"
    assert not decode.supports(model)
    model.config.model_type = "qwen2"

    class Patched(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.__class__ = Patched
    assert not decode.supports(model)


def test_no_more_rows_side_by_side_than_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny("llama"), questions()
    row = 2 * 3 * 2 * 8 * 100 * 4  # keys and values, layers, heads, width, columns, bytes
    monkeypatch.setattr(hardware, "memory", lambda: (0, 2 * 5 * row + 1))
    assert decode.rows_in_memory(model, 100, torch.device("cpu")) == 5
    monkeypatch.setattr(hardware, "memory", lambda: (0, 0))
    assert ours(model, prompts, GREEDY, 4) == [
        alone(model, prompt, 30)[: max_tokens(index, 30)] for index, prompt in enumerate(prompts)
    ]


def sequence(*prompt: int, tokens: tuple[int, ...] = (), seed: bytes = b"") -> DecodingSequence:
    result = DecodingSequence(0, list(prompt), 10, seed, frozenset(prompt))
    for token in tokens:
        result.append(token, StopCriteria(None, Stops()))
    return result


def test_the_repetition_penalty_counts_prompt_and_answer_but_not_end_tokens() -> None:
    settings = GenerationSection(repetition_penalty=2.0)
    sequences = [sequence(3, 4), sequence(1, 2, 5, tokens=(0,))]
    logits = torch.tensor([[1.5, 1.4, 1.3, 2.0, 2.1, 0.0], [3.0, 2.9, 2.8, 1.6, 1.0, 1.7]])
    assert choose_tokens(logits, sequences, settings, frozenset({5})) == [0, 5]  # 2.0 and 2.1 halved
    assert choose_tokens(-logits, [sequence(5), sequence(4)], settings, frozenset()) == [
        5,
        3,
    ]  # below 0 doubled
    assert choose_tokens(logits, sequences, GenerationSection(), frozenset()) == [4, 0]


def test_draws_follow_the_distribution_after_top_k_and_top_p() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.10]])
    settings = GenerationSection(do_sample=True, temperature=1.0, top_p=1.0, top_k=3)
    one = sequence(seed=b"seed")
    drawn = Counter(choose_tokens(probabilities.log(), [one], settings, frozenset())[0] for _ in range(4000))
    assert set(drawn) == {0, 1, 2}
    for token, share in enumerate((0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9)):
        assert abs(drawn[token] / 4000 - share) < 0.03
    nucleus = settings.model_copy(update={"top_p": 0.6, "top_k": 0})
    assert {choose_tokens(probabilities.log(), [one], nucleus, frozenset())[0] for _ in range(200)} == {0, 1}


def test_a_seed_depends_on_the_prompt_and_not_on_its_place() -> None:
    first, second, again = seeds([[1, 2], [3], [1, 2]], seed=7)
    assert len({first, second, again}) == 3
    assert seeds([[3], [1, 2], [1, 2]], seed=7) == [second, first, again]
    assert first not in seeds([[1, 2]], seed=8)
