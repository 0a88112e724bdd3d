"""Packed rows do not mix in any family whose attention transformers dispatches; other families are padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.step import attention
from sft.step.batch import split_micro_batches
from tests.step import models


def _logits_row_by_row(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    rows = batch["input_ids"].split(batch["lengths"].tolist())
    return [model(input_ids=row[None]).logits[0] for row in rows]


def _logits_packed(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    (micro,) = split_micro_batches(batch, tokens=10_000, packed=True)
    return list(model(**micro.inputs, use_cache=False).logits[0].split(batch["lengths"].tolist()))


def _largest_difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_gpt2"])
def test_packed_rows_have_the_logits_they_have_alone(family: str, request: pytest.FixtureRequest) -> None:
    model = models.load(request.getfixturevalue(family), dtype=torch.float32).eval()
    batch = models.batch()
    with torch.no_grad():
        actual, expected = _logits_packed(model, batch), _logits_row_by_row(model, batch)
    assert _largest_difference(actual, expected) < 3e-6
    assert attention.keeps_rows_apart(model)


def _llama_like(kind: str, **settings: object) -> Any:
    from transformers import AutoConfig

    shape = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(kind, **{**shape, **settings})


def _model(config: Any) -> Any:
    torch.manual_seed(0)
    name = attention.choose("cpu", config)
    assert name == attention.NAME
    return AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()


@pytest.mark.parametrize("window", [4, 64])
def test_a_sliding_window_is_honoured_whether_it_binds_or_not(window: int) -> None:
    model = _model(_llama_like("mistral", sliding_window=window))
    batch = models.batch()
    with torch.no_grad():
        actual, expected = _logits_packed(model, batch), _logits_row_by_row(model, batch)
    assert _largest_difference(actual, expected) < 3e-6


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3", "granite", "cohere"])
def test_packed_rows_do_not_mix_in_other_families(kind: str) -> None:
    model = _model(_llama_like(kind))
    batch = models.batch()
    with torch.no_grad():
        actual, expected = _logits_packed(model, batch), _logits_row_by_row(model, batch)
    assert _largest_difference(actual, expected) < 3e-6
    assert attention.keeps_rows_apart(model)


def test_caps_sinks_encoders_and_own_attention_are_refused() -> None:
    from transformers import AutoConfig

    gemma2 = _llama_like("gemma2")
    for kind, chosen in (("t5", "sdpa"), ("falcon", "sdpa"), ("gpt_oss", "eager"), ("bloom", "eager")):
        assert attention.choose("cpu", AutoConfig.for_model(kind)) == chosen, kind
    assert attention.choose("cpu", gemma2) == "eager"
    assert attention.choose("cpu", {"model_type": "never-heard-of"}) == "sdpa"
    assert attention.choose("cpu", {"model_type": "qwen2"}) == attention.NAME
    assert attention.choose("mps", {"model_type": "qwen2"}) == "sdpa"


def test_without_a_capable_gpu_cuda_uses_padded_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert attention.choose("cuda", {"model_type": "qwen2"}) == "sdpa"


def test_a_model_that_mixes_rows_is_detected(tiny_qwen2: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.load(tiny_qwen2, dtype=torch.float32)
    forward = model.forward

    def leaking(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = leaking
    assert not attention.keeps_rows_apart(model)
    assert "padded instead" in caplog.text
    assert model.training
    assert not attention.keeps_rows_apart(models.load(tiny_qwen2, attn="sdpa"))


def test_generation_equals_that_of_sdpa(tiny_qwen2: Path) -> None:
    ids = torch.tensor([[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    answers = [
        models.load(tiny_qwen2, attn=name, dtype=torch.float32)
        .eval()
        .generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
        for name in (attention.NAME, "sdpa")
    ]
    assert answers[0].tolist() == answers[1].tolist()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_a_row_attends_as_sdpa_does_also_under_autocast(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 8, dtype=dtype) for heads, length in ((4, 1), (2, 7), (2, 7)))
    mask = torch.arange(7) >= torch.tensor([0, 2, 6])[:, None, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = attention._one_query(query, key, value, mask, None)
    grouped = (tensor.repeat_interleave(2, dim=1).float() for tensor in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), *grouped, attn_mask=mask)
    torch.testing.assert_close(
        out.float(), expected.transpose(1, 2), **({"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {})
    )


def test_checkpointing_recomputes_packed_rows_alike(tiny_qwen2: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.load(tiny_qwen2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        (micro,) = split_micro_batches(models.batch(), tokens=10_000, packed=True)
        model(**micro.inputs, use_cache=False).logits.square().mean().backward()
        gradients.append(models.gradients(model))
    assert models.relative(gradients[1], gradients[0]) < 1e-12


def _one_by_one(q: Any, k: Any, v: Any, at: Any, _at: Any, longest: int, _longest: int, *, scale: Any) -> Any:
    """The result of torch's kernel, [T, heads, width], as torch 2.11 declares it and as 2.13 does."""
    assert longest == int(at.diff().max())
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(len(q) // len(k), 0) for tensor in (k, v))
    lengths = at.diff().tolist()
    rows = zip(*(tensor.split(lengths, 1) for tensor in (q, k, v)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*row, is_causal=True, scale=scale) for row in rows], 1).transpose(0, 1)


def _torch_2_11(*args: Any, return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1)) -> Any:
    assert window_size == (-1, 0)
    return _one_by_one(*args, scale=scale)


def _torch_2_13(*args: Any, scale: Any = None, window_size: Any = (-1, -1), enable_gqa: bool = False) -> Any:
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return _torch_2_11(*args, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [_torch_2_11, _torch_2_13])
@pytest.mark.parametrize("shared", [2, 4])
def test_the_cuda_kernel_of_each_torch_gives_what_sdpa_gives(
    kernel: Any, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    query, key, value = (torch.randn(1, heads, 9, 8, dtype=torch.float64) for heads in (4, shared, shared))
    bounds, layer = torch.tensor([0, 5, 9], dtype=torch.int32), torch.nn.Module()
    layer.num_key_value_groups = 4 // shared
    expected, _ = attention.rows_attention(layer, query, key, value, bounds, scaling=0.3)
    assert torch.allclose(attention._varlen(query, key, value, bounds, 0.3), expected, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_packed_rows_have_the_logits_they_have_alone(tiny_qwen2: Path) -> None:
    model = models.load(tiny_qwen2, dtype=torch.bfloat16).cuda().eval()
    batch = {name: value.cuda() for name, value in models.batch().items()}
    with torch.no_grad():
        actual, expected = _logits_packed(model, batch), _logits_row_by_row(model, batch)
    assert _largest_difference(actual, expected) < 2e-2
    assert attention.keeps_rows_apart(model)


@pytest.mark.parametrize("length", [1, 37, 130])
def test_short_rows_in_bf16_on_the_cpu_are_as_exact_as_torchs_attention(length: int) -> None:
    """Output and gradients of 6 heads that share 2 keys' heads: off from fp64 by bf16's rounding (2^-9), as SDPA is."""
    drawn = torch.Generator().manual_seed(length)
    query, key, value, grad = (torch.randn(1, heads, length, 16, generator=drawn) * 2 for heads in (6, 2, 2, 6))

    def attend(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in (query, key, value)]
        module = torch.nn.Module()
        module.num_key_value_groups = 3  # type: ignore[assignment]  # what transformers repeats keys by
        out = attention.row_by_row(module, *inputs, [length], 0.0, 0.3)
        return [out, *torch.autograd.grad(out, inputs, grad.transpose(1, 2).bfloat16().to(dtype))]

    exact, ours = attend(torch.float64), attend(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHORT", 0)
        torchs = attend(torch.bfloat16)
    for reference, actual, other in zip(exact, ours, torchs, strict=True):
        assert actual.dtype == torch.bfloat16 and actual.shape == reference.shape
        if length > 1:
            assert not torch.equal(actual, other)  # else SHORT decides nothing
        size = reference.norm().clamp_min(1e-6)
        assert float((actual - reference).norm() / size) < 1.5 * float((other - reference).norm() / size) + 1e-4
