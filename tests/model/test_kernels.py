"""Faster layers give the same step or are refused; weights keep their names, evaluation stays plain.

Liger's kernels are Triton's: on a machine without a GPU they run in Triton's interpreter, which shows that they are
put in the right places with the right settings and that their arithmetic is right in fp32. It shows nothing about
speed, bf16 (which the interpreter lacks), or what the Triton compiler generates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sft.config.schema import LoraSection, TuningSection
from sft.errors import EnvironmentProblem
from sft.model import adapters, kernels
from sft.model.lora import LoraUpdate, keep_mask
from sft.step import attention
from sft.step.step import StepConfig, forward_backward
from tests.step import models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Norms and gated MLPs of two layers and the last norm.
FAMILIES = {"qwen2": 7, "llama": 7, "gemma": 7, "qwen3": 11, "phi3": 7, "glm4": 11}


@pytest.fixture(scope="module")
def liger() -> Iterator[None]:
    """Liger, on the GPU or interpreted: CUDA's own functions written out, floats as the numbers a kernel would get."""
    if not (find_spec("liger_kernel") and find_spec("triton")):
        pytest.skip("liger-kernel and triton are not installed")
    if DEVICE == "cuda":
        yield
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU this runs with TRITON_INTERPRET=1 in pytest's environment")
    from tests.model import interpreted

    with pytest.MonkeyPatch.context() as patch:
        interpreted.prepare(patch)
        yield


def small(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **sizes, **more, bos_token_id=2)
    torch.manual_seed(0)
    name = attention.choose("cpu", config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32).to(DEVICE).train()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def four_bit(folder: Path) -> Any:
    """LoRA with dropout on NF4, checkpointing."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    attention.register()
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
        attn_implementation=attention.NAME,
    )
    base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False)
    return get_peft_model(base, settings).train()


def gradients(model: Any, tokens: int = 4096) -> torch.Tensor:
    torch.manual_seed(3)
    forward_backward(model, models.batch(), StepConfig(micro_batch_tokens=tokens, packed=True))
    return models.gradients(model)


def with_norms(forward: Callable[[Any], Any]) -> Callable[[Any], None]:
    """In the place of `_compile_layers`: another forward for every norm of the model."""

    def use(model: Any) -> None:
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                kernels._set_forward(module, forward(module), "compiled")

    return use


@pytest.mark.parametrize(("family", "layers"), FAMILIES.items())
def test_ligers_kernels_compute_the_norms_and_mlps_of_a_family_with_equal_gradients(
    liger: None, family: str, layers: int
) -> None:
    model = small(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    names = list(model.state_dict())
    ids = torch.arange(3, 20, device=DEVICE)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    kernels.apply_kernels(model, "liger", device=DEVICE)
    assert len([module for module in model.modules() if "forward" in module.__dict__]) == layers
    assert kernels.kernels_of(model) == "liger" and list(model.state_dict()) == names
    faster = model(input_ids=ids, use_cache=False).logits
    assert 0 < models.relative(faster, plain) < 1e-5
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    kernels.restore_plain_layers(model)
    assert kernels.kernels_of(model) == "plain"
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


def test_ligers_kernels_train_adapters_on_four_bits_as_plain_layers_do(liger: None, tiny_qwen2: Path) -> None:
    model = four_bit(tiny_qwen2)
    plain = gradients(model)
    kernels.apply_kernels(model, "liger", device=DEVICE)
    assert 0 < models.relative(gradients(model), plain) < 1e-4


def lora(folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(models.load(folder, dtype=torch.float32), config).train()


def test_fused_lora_layers_give_the_gradients_of_pefts(tiny_qwen2: Path) -> None:
    model = lora(tiny_qwen2)
    ids, names = torch.arange(3, 20)[None], list(model.state_dict())
    plain = gradients(model)
    kernels.apply_kernels(model, "fused", device="cpu")
    assert kernels.kernels_of(model) == "fused" and list(model.state_dict()) == names
    assert model.training and len([m for m in model.modules() if "forward" in m.__dict__]) == 14  # 7 in each layer
    assert 0 < models.relative(gradients(model), plain) < 1e-6
    with model.disable_adapter():
        without = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(without, models.load(tiny_qwen2, dtype=torch.float32)(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_that_began_with_the_base_s_weights_are_those_of_plain_ones(
    tiny_qwen2: Path, dtype: torch.dtype
) -> None:
    tuning = TuningSection(mode="lora", lora=LoraSection(r=4, dropout=0.0, init="olora"))
    torch.manual_seed(0)
    model = adapters.attach(models.load(tiny_qwen2, dtype=dtype), tuning, gradient_checkpointing=False)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.02 * torch.randn_like(weight)
    plain = gradients(model)
    kernels.apply_kernels(model, "fused", device="cpu")
    assert 0 < models.relative(gradients(model), plain) < (1e-5 if dtype == torch.float32 else 5e-2)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        answer = model(input_ids=ids, use_cache=False).logits
    difference = float((model(input_ids=ids, use_cache=False).logits - answer).detach().abs().max())
    assert difference < (1e-5 if dtype == torch.float32 else 5e-2)


def test_fused_lora_layers_train_adapters_on_four_bits_and_draw_dropout_anew(tiny_qwen2: Path) -> None:
    model = four_bit(tiny_qwen2)
    kernels.apply_kernels(model, "fused", device=DEVICE)
    first, again = gradients(model), gradients(model)  # layers are recomputed in the backward pass: with the same mask
    assert torch.equal(first, again)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    without = gradients(model)
    assert models.relative(first, without) > 1e-2
    kernels.restore_plain_layers(model)
    assert models.relative(gradients(model), without) < 1e-4


def test_dora_layers_stay_plain(tiny_qwen2: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="they support no layer of this model"):
        kernels.apply_kernels(lora(tiny_qwen2, use_dora=True), "fused", device="cpu")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_update_of_a_lora_layer_has_the_gradients_of_its_formula(dropout: float) -> None:
    shapes = [(2, 7, 9), (2, 7, 12), (4, 12), (9, 4)]
    drawn = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=drawn, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def update(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return LoraUpdate.apply(*tensors, 0.5, dropout)

    result, x, a, b = inputs
    torch.manual_seed(3)
    mask = keep_mask(x, dropout)
    dropped = x if mask is None else x * mask / (1 - 19661 / 65536)
    assert torch.allclose(update(*inputs), result + 0.5 * dropped @ a.T @ b.T)
    assert torch.autograd.gradcheck(update, inputs)
    gradient = torch.autograd.grad(update(*inputs).add_(x[..., :9]).sum(), x)[0]  # in place, as in Falcon's layers
    assert torch.allclose(gradient, torch.autograd.grad((update(*inputs) + x[..., :9]).sum(), x)[0])


def test_a_dropout_mask_drops_its_share_and_follows_the_seed() -> None:
    like = torch.empty(1001, 999, dtype=torch.bfloat16)
    torch.manual_seed(0)
    first, second = keep_mask(like, 0.05), keep_mask(like, 0.05)
    torch.manual_seed(0)
    assert first is not None and second is not None and torch.equal(first, keep_mask(like, 0.05))
    assert first.dtype == like.dtype and set(first.unique().tolist()) == {0.0, 1.0}
    assert abs(float(first.float().mean()) - 0.95) < 0.001  # 5 standard deviations
    assert abs(float((first * second).float().mean()) - 0.95**2) < 0.0015  # drawn independently
    assert keep_mask(like, 0.0) is None


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda norm: lambda hidden: type(norm).forward(norm, hidden) * 1.001, "loss and gradients differ"),
        (lambda norm: lambda hidden: _nan_gradient(type(norm).forward(norm, hidden)), "nan"),
        (lambda norm: lambda hidden: hidden.no_such_attribute, "AttributeError"),
    ],
)
def test_kernels_that_differ_or_fail_are_refused_and_the_layers_stay_plain(
    tiny_qwen2: Path, forward: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(tiny_qwen2, dtype=torch.float32)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    monkeypatch.setattr(kernels, "_compile_layers", with_norms(forward))
    with pytest.raises(EnvironmentProblem, match=reason) as caught:
        kernels.apply_kernels(model, "compiled", device=DEVICE)
    assert (caught.value.where, caught.value.fix) == ("train.kernels", "--set train.kernels=plain")
    assert kernels.kernels_of(model) == "plain" and not any("forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())


def _nan_gradient(output: torch.Tensor) -> torch.Tensor:
    output.register_hook(lambda gradient: gradient * torch.nan)
    return output


def test_kernels_that_are_not_available_are_an_error_and_auto_means_plain(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(tiny_qwen2, dtype=torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if DEVICE == "cpu":
        with pytest.raises(EnvironmentProblem, match=r"liger-kernel is not installed|need a CUDA GPU"):
            kernels.apply_kernels(model, "liger", device=DEVICE)
    with pytest.raises(EnvironmentProblem, match="unsloth has kernels of its own"):
        kernels.apply_kernels(model, "compiled", device=DEVICE, backend="unsloth")
    kernels.apply_kernels(model, "auto", device=DEVICE)
    assert kernels.kernels_of(model) == "plain"


def test_a_step_in_which_the_compiler_fails_is_replayed_with_plain_layers(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    calls = list[int]()

    def failing(norm: Any) -> Any:
        def forward(hidden: Any) -> Any:
            calls.append(1)
            if len(calls) == 8:  # the check and the first layer went well
                raise TorchDynamoException("no compiler for this length")
            return type(norm).forward(norm, hidden)

        return forward

    model = models.load(tiny_qwen2, dtype=torch.float32)
    plain = gradients(model, 20)
    monkeypatch.setattr(kernels, "_compile_layers", with_norms(failing))
    kernels.apply_kernels(model, "compiled", device=DEVICE)
    assert torch.equal(gradients(model, 20), plain)
    assert kernels.kernels_of(model) == "plain"
    assert "torch.compile failed" in caplog.text and "no compiler for this length" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_give_the_same_step_with_dropout_on_four_bits_however_it_is_split(tiny_qwen2: Path) -> None:
    model = four_bit(tiny_qwen2)
    names = list(model.state_dict())
    plain = {tokens: gradients(model, tokens) for tokens in (32, 4096, 1)}
    kernels.apply_kernels(model, "compiled", device=DEVICE)
    for tokens, expected in plain.items():
        assert models.relative(gradients(model, tokens), expected) < 1e-5
    assert kernels.kernels_of(model) == "compiled" and list(model.state_dict()) == names
