"""Our decode loop against transformers' own `generate`, prompt by prompt, on a tiny model of every proven family."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft.config.schema import GenerationSection
from sft.generation import decode
from sft.generation.decode import Ask, Decoder, chances, shared_prefix
from sft.generation.stop import StopWatcher
from sft.model import hardware
from tests.generation.test_stopping import Ends

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


def tiny(family: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(3)
    sizes = {k: v for k, v in SIZES.items() if family != "gpt2" or not k.startswith(("hidden", "inter", "num", "max"))}
    config = AutoConfig.for_model(family, **{**sizes, **OWN.get(family, {})})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def questions(count: int = 11, *, alike: int = 10) -> list[list[int]]:
    draw = random.Random(5)
    start = [draw.randrange(1, 96) for _ in range(alike)]
    return [start + [draw.randrange(1, 96) for _ in range(draw.choice((1, 3, 8, 20, 33)))] for _ in range(count)]


def alone(model: Any, prompt: list[int], most: int) -> list[int]:
    made = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=most, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


def room_for(index: int, most: int) -> int:
    """Rows that end at different times, so that others take their places."""
    return most - 3 * (index % 4)


def ended(made: list[int], ends: frozenset[int]) -> list[int]:
    first = next((at for at, token in enumerate(made) if token in ends), len(made))
    return made[: first + 1]


def ours(
    model: Any, prompts: list[list[int]], settings: GenerationSection, rows: int, ends: frozenset[int] = frozenset()
) -> list[list[int]]:
    asks = [
        Ask(index, prompt, room_for(index, settings.max_new_tokens), chance, frozenset(prompt))
        for index, (prompt, chance) in enumerate(zip(prompts, chances(prompts, settings.seed), strict=True))
    ]
    done: list[int] = []
    with torch.no_grad():
        Decoder(
            model, asks, settings, StopWatcher(None, Ends(ends)), rows=rows, device=torch.device("cpu"),
            done=lambda ask: done.append(ask.index),
        ).run()  # fmt: skip
    assert sorted(done) == list(range(len(prompts)))
    return [ask.made for ask in asks]


QUICK = {"qwen2", "gemma2", "gpt2", "phi3"}


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(decode.PROVEN)],
)
def test_every_proven_family_answers_as_transformers_does_one_by_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SLACK", 1)  # so that the store is shifted on the way
    shifts = counted(monkeypatch, decode.KVCache, "shift")
    model, prompts = tiny(family, "eager" if family == "gemma2" else "sdpa"), questions()
    assert decode.serves(model)
    free = [alone(model, prompt, 30) for prompt in prompts]
    ends = frozenset({free[0][12], free[1][20]} | {made[-1] for made in free[4:6]})
    expected = [ended(made[: room_for(index, 30)], ends) for index, made in enumerate(free)]
    assert len({len(made) for made in expected}) > 2
    assert shared_prefix(prompts) == 10
    for rows in (1, 3, 20):
        assert ours(model, prompts, GREEDY, rows, ends) == expected
    apart = questions(alike=0)
    free = [alone(model, prompt, 30)[: room_for(index, 30)] for index, prompt in enumerate(apart)]
    assert ours(model, apart, GREEDY, 4) == free
    assert shifts


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    calls: list[int] = []
    real: Callable[..., Any] = getattr(owner, name)

    def counting(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_what_is_drawn_does_not_depend_on_who_is_answered_beside_it() -> None:
    model, prompts = tiny("llama"), questions()
    drawn = GenerationSection(max_new_tokens=20, do_sample=True, temperature=1.2, top_k=0, top_p=0.95, seed=3)
    found = ours(model, prompts, drawn, 1)
    assert ours(model, prompts, drawn, 4) == ours(model, prompts, drawn, 20) == found
    unequal = ours(model, prompts[::-1], drawn, 4)[::-1]
    assert all(a[: len(b)] == b[: len(a)] for a, b in zip(unequal, found, strict=True))
    assert ours(model, prompts, drawn.model_copy(update={"seed": 4}), 4) != found


def test_what_prompts_begin_with_alike() -> None:
    assert shared_prefix([[1] * 9 + [2], [1] * 9 + [3], [1] * 12]) == 9
    assert shared_prefix([[1] * 9, [1] * 12]) == 8  # a token of each is left over, to be answered
    assert shared_prefix([[1] * 7 + [2, 3], [1] * 12]) == 0
    assert shared_prefix([[1] * 30]) == 0


def test_another_class_or_a_patched_forward_is_left_to_the_library() -> None:
    model = tiny("qwen2")
    model.config.model_type = "qwen2_special"
    assert not decode.serves(model)
    model.config.model_type = "qwen2"

    class Patched(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.__class__ = Patched
    assert not decode.serves(model)


def test_no_more_rows_than_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny("llama"), questions()
    row = 2 * 3 * 2 * 8 * 100 * 4  # keys and values, layers, heads, width, columns, bytes
    monkeypatch.setattr(hardware, "memory", lambda: (0, 2 * 5 * row + 1))
    assert decode.affordable(model, 100, torch.device("cpu")) == 5
    monkeypatch.setattr(hardware, "memory", lambda: (0, 0))
    assert ours(model, prompts, GREEDY, 4) == [
        alone(model, prompt, 30)[: room_for(index, 30)] for index, prompt in enumerate(prompts)
    ]
