"""The engine on tiny models of random weights: batches equal to single prompts, and the model is left unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from sft.config.schema import GenerationSection, TuningSection
from sft.errors import EnvironmentProblem
from sft.generation.stop import Answer
from sft.model import adapters
from sft.step import attention
from tests.generation.test_stop import Stops, answering

TEXTS = [
    "What is the capital of France?",
    "2 + 2 =",
    "Name: Mara Olsen; order 48213; the kettle arrived broken and she wants her money back! Please answer.",
    "The",
    "You are a helpful assistant. Please answer in one short sentence.",
    "17 - 9 = ",
    "the lazy dog",
]
GREEDY = GenerationSection(max_new_tokens=24)


def opened(folder: Path, **kwargs: Any) -> tuple[Any, Any, list[list[int]]]:
    kind = AutoModelForSeq2SeqLM if "t5" in folder.name else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = kind.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    return model, tokenizer, [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def qwen2(tiny_qwen2: Path) -> tuple[Any, Any, list[list[int]]]:
    return opened(tiny_qwen2)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    settings: Any,
    stops: Any,
    *,
    batch_size: int,
    kind: Any = "causal",
    **more: Any,
) -> list[Answer]:
    return answering(model, tokenizer, stops, kind).generate(prompts, settings, batch_size, **more)


def stream(model: Any, tokenizer: Any, prompt: list[int], settings: Any, stops: Any) -> Any:
    return answering(model, tokenizer, stops).stream(prompt, settings)  # type: ignore[arg-type]


# of the tokens that random weights like, so that some answers stop and some do not
SOME = Stops(frozenset(range(3, 400, 9)))


def by_hand(model: Any, ids: list[int], ends: frozenset[int], most: int) -> list[int]:
    """Greedy decoding with no cache, no padding and no library."""
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < most:
            tokens.append(int(model(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
            if tokens[-1] in ends:
                return tokens[:-1]
    return tokens


def test_a_batch_gives_the_answers_of_single_prompts_and_of_a_manual_loop(qwen2: Any) -> None:
    model, tokenizer, prompts = qwen2
    together = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4)
    alone = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=1)
    assert together == alone
    assert [answer.ids for answer in together] == [by_hand(model, prompt, SOME.ids, 24) for prompt in prompts]
    assert {answer.stopped for answer in together} == {True, False}
    assert all(answer.tokens == len(answer.ids) + answer.stopped for answer in together)


def test_a_prefix_answers_in_batches_as_in_a_manual_loop_and_the_base_without_it(tiny_qwen2: Path) -> None:
    base, tokenizer, prompts = opened(tiny_qwen2)
    without = generate(base, tokenizer, prompts, GREEDY, SOME, batch_size=4)
    torch.manual_seed(0)
    tuning = TuningSection(mode="lora", adapter="prefix", prefix_tokens=5)
    model = adapters.attach(base, tuning, gradient_checkpointing=False).eval()
    model.prompt_encoder["default"].embedding.weight.data.mul_(3)
    answers = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4)
    assert [answer.ids for answer in answers] == [by_hand(model, prompt, SOME.ids, 24) for prompt in prompts]
    with answering(model, tokenizer, SOME).base_only():
        assert generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4) == without != answers


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_t5"])
def test_other_families_give_the_same_answers_in_batches(family: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer, prompts = opened(request.getfixturevalue(family))
    kind: Any = "seq2seq" if family == "tiny_t5" else "causal"
    together = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=8, kind=kind)
    alone = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=1, kind=kind)
    assert together == alone
    assert any(answer.ids for answer in together)


def test_the_packed_attention_of_training_gives_the_same_answers(qwen2: Any, tiny_qwen2: Path) -> None:
    attention.register()
    model, tokenizer, prompts = opened(tiny_qwen2, attn_implementation=attention.NAME)
    expected = generate(qwen2[0], tokenizer, prompts, GREEDY, SOME, batch_size=4)
    assert generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4) == expected
    assert generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=1) == expected


def test_stop_strings_end_answers_wherever_they_occur(qwen2: Any) -> None:
    model, tokenizer, prompts = qwen2
    free = generate(model, tokenizer, prompts, GREEDY, Stops(), batch_size=4)
    assert not any(answer.stopped for answer in free)
    string = free[0].text[3:6]
    got = generate(model, tokenizer, prompts, GREEDY.model_copy(update={"stop": [string]}), Stops(), batch_size=4)
    assert [answer.text for answer in got] == [answer.text.split(string)[0] for answer in free]
    assert [answer.stopped for answer in got] == [string in answer.text for answer in free]
    assert got[0].tokens < free[0].tokens


def test_sampling_is_seeded_and_leaves_the_random_state_alone(qwen2: Any) -> None:
    model, tokenizer, prompts = qwen2
    drawn = GenerationSection(max_new_tokens=16, do_sample=True, temperature=1.5, top_p=1.0, top_k=0, seed=7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, prompts, drawn, Stops(), batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == generate(model, tokenizer, prompts, drawn, Stops(), batch_size=4)
    other = drawn.model_copy(update={"seed": 8})
    assert first != generate(model, tokenizer, prompts, other, Stops(), batch_size=4)


def test_the_models_own_generation_config_is_ignored(qwen2: Any) -> None:
    model, tokenizer, prompts = qwen2
    expected = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4)
    liked = next(answer.ids[0] for answer in expected if answer.ids)
    surprise = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=5, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=20,
        num_beams=2, eos_token_id=[1], forced_eos_token_id=9, suppress_tokens=[liked],
    )  # fmt: skip
    original, model.generation_config = model.generation_config, surprise
    try:
        assert generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4) == expected
        assert model.generation_config is surprise
    finally:
        model.generation_config = original


def test_a_model_in_training_mode_returns_to_training_mode(tiny_qwen2: Path, qwen2: Any) -> None:
    model, tokenizer, prompts = opened(tiny_qwen2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    model.model.norm.eval()
    graphs: list[bool] = []
    model.register_forward_pre_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    got = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4)
    assert got == generate(qwen2[0], tokenizer, prompts, GREEDY, SOME, batch_size=4)
    assert graphs and not any(graphs)
    assert model.training and not model.model.norm.training and model.is_gradient_checkpointing
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_repetition_penalty_is_the_same_in_a_batch(qwen2: Any) -> None:
    model, tokenizer, prompts = qwen2
    settings = GREEDY.model_copy(update={"repetition_penalty": 1.6})
    together = generate(model, tokenizer, prompts, settings, SOME, batch_size=7)
    assert together == generate(model, tokenizer, prompts, settings, SOME, batch_size=1)
    assert together != generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=7)


def test_when_memory_runs_out_the_batch_is_halved_and_nothing_is_lost(tiny_qwen2: Path, qwen2: Any) -> None:
    model, tokenizer, prompts = opened(tiny_qwen2)
    seen: list[int] = []

    def scarce(most: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            rows = len(kwargs["input_ids"])
            seen.append(rows)
            if rows > most:
                raise torch.OutOfMemoryError("CUDA out of memory (in a test)")

        return model.register_forward_pre_hook(hook, with_kwargs=True)

    handle = scarce(2)
    done: list[tuple[int, int]] = []
    got = generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=6, on_progress=lambda *at: done.append(at))
    assert got == generate(qwen2[0], tokenizer, prompts, GREEDY, SOME, batch_size=1)
    assert (seen[:2], max(seen[2:])) == ([6, 3], 1)
    assert done[-1] == (7, 7)
    handle.remove()
    scarce(0)
    with pytest.raises(EnvironmentProblem, match="not enough memory for a single answer"):
        generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=2)


def test_a_prompt_too_long_loses_its_oldest_tokens(tiny_gpt2: Path) -> None:
    model, tokenizer, prompts = opened(tiny_gpt2)
    long = (prompts[2] * 40)[:600]
    answers = generate(model, tokenizer, [long, prompts[0]], GREEDY, Stops(), batch_size=2)
    assert [answer.truncated for answer in answers] == [600 - (512 - 24), 0]
    assert answers[0].ids == generate(model, tokenizer, [long[-488:]], GREEDY, Stops(), batch_size=1)[0].ids


def test_streaming_gives_the_same_text_in_pieces(qwen2: Any) -> None:
    model, tokenizer, prompts = qwen2
    for prompt, expected in zip(prompts, generate(model, tokenizer, prompts, GREEDY, SOME, batch_size=4), strict=True):
        pieces, answer = drained(stream(model, tokenizer, prompt, GREEDY, SOME))
        assert ("".join(pieces), answer) == (expected.text, expected)
        assert all("�" not in piece for piece in pieces)


def test_streaming_decodes_each_token_a_few_times_however_long_the_answer_is(qwen2: Any) -> None:
    model, tokenizer, prompts = qwen2
    decoded: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            decoded.append(len(ids))
            return str(tokenizer.decode(ids, **kwargs))

    settings = GenerationSection(max_new_tokens=400)
    pieces, answer = drained(stream(model, Counting(), prompts[0], settings, Stops()))
    assert "".join(pieces) == answer.text and answer.tokens == 400
    assert sum(decoded) < 20 * answer.tokens


def drained(generator: Any) -> tuple[list[str], Answer]:
    pieces = []
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as stop:
            return pieces, stop.value


def test_a_stream_that_is_closed_stops_the_model(tiny_qwen2: Path) -> None:
    model, tokenizer, prompts = opened(tiny_qwen2)
    model.train()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    pieces = stream(model, tokenizer, prompts[0], GenerationSection(max_new_tokens=900), Stops())
    next(pieces)
    pieces.close()
    assert len(calls) < 400
    assert model.training


def test_an_error_in_the_model_reaches_the_reader_of_the_stream(tiny_qwen2: Path) -> None:
    model, tokenizer, prompts = opened(tiny_qwen2)

    def broken(*_: Any) -> None:
        raise ValueError("broken on purpose")

    model.register_forward_pre_hook(broken)
    with pytest.raises(ValueError, match="broken on purpose"):
        next(stream(model, tokenizer, prompts[0], GREEDY, Stops()))
