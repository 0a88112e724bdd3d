"""The tiled head gives the loss and gradients of full logits; unknown heads keep full logits, with a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sft.step import loss
from sft.step.batch import Collator, split_micro_batches
from sft.step.loss import LogitTransform, TokenLoss, tile_gradient_
from sft.step.step import StepConfig, token_losses
from tests.step import models


def _both(model: Any, *, smoothing: float = 0.0, tile: int = 4, seq2seq: bool = False) -> tuple[float, float]:
    """Relative differences of loss and of gradients between tiles and full logits."""
    batch = Collator("seq2seq")(models.seq2seq_rows()) if seq2seq else models.batch()
    micro = split_micro_batches(batch, tokens=10_000, packed=False)[0]
    results = []
    for logits in ("full", "chunked"):
        config = StepConfig(logits=logits, logits_tile=tile, label_smoothing=smoothing)  # type: ignore[arg-type]
        losses = token_losses(model, micro, config)
        assert losses.shape == (micro.labelled,)
        (3 * losses.sum() / micro.labelled).backward()
        results.append((losses.detach(), models.gradients(model)))
    (losses, gradient), (tiled_losses, tiled_gradient) = results
    assert float(gradient.norm()) > 0
    return models.relative(tiled_losses, losses), models.relative(tiled_gradient, gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tile", [1, 7, 512])
def test_a_tied_head_trained_whole(tiny_qwen2: Path, smoothing: float, tile: int) -> None:
    loss, gradient = _both(models.load(tiny_qwen2), smoothing=smoothing, tile=tile)
    assert loss < 1e-12
    assert gradient < 1e-11


def test_in_fp32_loss_and_gradient_agree_to_a_millionth(tiny_qwen2: Path) -> None:
    loss, gradient = _both(models.load(tiny_qwen2, dtype=torch.float32))
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_take_their_loss_in_fp32(tiny_qwen2: Path, dtype: torch.dtype) -> None:
    model = models.load(tiny_qwen2, dtype=dtype)
    micro = split_micro_batches(models.batch(), tokens=10_000, packed=False)[0]
    tiled = token_losses(model, micro, StepConfig(logits_tile=5)).sum()
    full = token_losses(model, micro, StepConfig(logits="full")).sum()
    assert tiled.dtype == full.dtype == torch.float32
    assert abs(tiled.item() - full.item()) < 1e-6 * full.item()
    assert _both(model)[1] < 3e-2


@pytest.mark.parametrize(
    ("targets", "saved"), [(["q_proj", "down_proj"], []), (["q_proj"], ["lm_head"]), (["q_proj", "lm_head"], [])]
)
def test_adapters_in_the_blocks_a_head_saved_whole_and_an_adapter_on_the_head(
    tmp_path: Path, targets: list[str], saved: list[str]
) -> None:
    from tests.tiny_models import tiny_qwen2

    model = models.load(tiny_qwen2(tmp_path / "untied", tie_word_embeddings=False))
    settings = LoraConfig(r=4, target_modules=targets, modules_to_save=saved or None, init_lora_weights=False)
    loss, gradient = _both(get_peft_model(model, settings))
    assert loss < 1e-12
    assert gradient < 1e-11


SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("gemma2", {"final_logit_softcapping": 0.05}, LogitTransform(softcap=0.05)),
        ("granite", {"logits_scaling": 4.0}, LogitTransform(scale=0.25)),
        ("cohere", {"logit_scale": 0.125}, LogitTransform(scale=0.125)),
        ("phi", {}, LogitTransform()),  # a head with a bias
    ],
)
def test_soft_caps_scales_and_biases_are_honoured(
    kind: str, settings: dict[str, Any], expected: LogitTransform
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **settings}, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).double()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    off, gradient = _both(model.train().requires_grad_(), smoothing=0.1)
    assert loss._transforms[model] == expected
    assert off < 1e-9
    assert gradient < 1e-6  # models scale and cap by constants in their own precision


def test_t5_tied_and_untied(tiny_t5: Path) -> None:
    assert max(_both(models.load(tiny_t5, attn="sdpa", seq2seq=True), seq2seq=True)) < 1e-11
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = AutoConfig.for_model("t5", **shape, tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.0)
    assert max(_both(AutoModelForSeq2SeqLM.from_config(config).double().train(), seq2seq=True)) < 1e-11


def test_an_unknown_head_keeps_full_logits_with_one_warning(tiny_qwen2: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.load(tiny_qwen2)
    forward = model.forward

    def bent(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + output.logits.square()
        return output

    model.forward = bent
    assert max(_both(model)) < 1e-12
    assert max(_both(model)) < 1e-12
    assert caplog.text.count("the loss uses full logits") == 1


def test_a_first_batch_that_is_not_finite_decides_nothing_about_the_head(
    tiny_qwen2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that shares the weights would run other forward passes than the rest from then on: all would wait."""
    model = models.load(tiny_qwen2)
    hook = model.model.embed_tokens.register_forward_hook(lambda *call: call[2] * float("nan"))
    micro = split_micro_batches(models.batch(), tokens=10_000, packed=False)[0]
    assert token_losses(model, micro, StepConfig()).isnan().all()
    hook.remove()
    assert max(_both(model)) < 1e-12
    assert loss._transforms[model] == LogitTransform() and "full logits" not in caplog.text


def test_full_logits_are_never_computed(tiny_qwen2: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (vocabulary,) and out.is_contiguous():
                largest = max(largest, out.numel() // vocabulary)
            return out

    model = models.load(tiny_qwen2).requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    vocabulary = model.config.vocab_size
    micro = split_micro_batches(models.batch(), tokens=10_000, packed=False)[0]
    with Watch():
        token_losses(model, micro, StepConfig(logits_tile=6)).sum().backward()
    assert largest == 6


def test_a_tiles_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    raw, targets = 3 * torch.randn(5, 11, dtype=torch.float64), torch.tensor([0, 3, 10, 3, 7])
    for transform in (LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 1.5)):
        for kind in (TokenLoss(0.2, 0.1), TokenLoss(z_loss=0.1, dft=True)):
            leaf = raw.clone().requires_grad_()
            losses = loss.cross_entropy(transform(leaf), targets, kind)
            (expected,) = torch.autograd.grad(losses.sum(), leaf)
            mine = raw.clone()
            assert torch.allclose(tile_gradient_(mine, targets, transform, kind), losses, rtol=1e-12)
            assert torch.allclose(mine, expected, atol=1e-12)


@pytest.mark.parametrize("frozen_head", [True, False])
def test_losses_may_be_weighted_token_by_token(tiny_qwen2: Path, frozen_head: bool) -> None:
    """A preference loss weighs each row's tokens differently: gradients stay those of full logits."""
    gradients = []
    for logits in ("full", "chunked"):
        model = models.load(tiny_qwen2)
        model.get_output_embeddings().weight.requires_grad_(not frozen_head)
        micro = split_micro_batches(models.batch(), tokens=10_000, packed=False)[0]
        config = StepConfig(logits=logits, logits_tile=7, label_smoothing=0.1)  # type: ignore[arg-type]
        losses = token_losses(model, micro, config)
        weights = torch.linspace(-1, 2, len(losses), dtype=losses.dtype)
        (losses * weights).sum().backward()
        gradients.append(models.gradients(model))
    assert models.relative(gradients[1], gradients[0]) < 1e-11
