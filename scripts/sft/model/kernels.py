"""Faster ways to compute a model's layers: our LoRA layers for the CPU, Liger's Triton kernels, or torch.compile
(`train.kernels`).

`apply_kernels` checks on the model itself that loss and gradients stay the same, and refuses what differs. Kernels are
used where gradients are formed; evaluation and answers use plain layers, as `eval`, `infer` and a merged model do.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from sft.errors import EnvironmentProblem, one_line
from sft.model.adapters import is_linear

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Kernels = Literal["plain", "fused", "liger", "compiled"]
PLAIN: Kernels = "plain"
# Relative error allowed by dtype. Rounding alone makes 2e-7 for two layers in fp32, 1e-3 in fp16 and 8 times that in
# bf16; it grows as the root of their number.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def apply_kernels(
    model: nn.Module,
    kernels: Literal["auto"] | Kernels,
    *,
    device: str,
    autocast: torch.dtype | None = None,
    backend: Literal["bnb", "unsloth"] = "bnb",
) -> None:
    """Computes the layers of `model`, wrappers included, with these kernels from here on; `auto` means plain here.

    autocast: the 16-bit type that training computes in, None for the weights' own. Raises EnvironmentProblem if the
    kernels are not available, fail, or give another loss or other gradients, NaN included; the layers are plain then.
    """
    restore_plain_layers(model)
    if kernels in ("auto", PLAIN):
        return
    expected = _loss_and_gradients(model, device, autocast)
    try:
        if backend == "unsloth":
            raise EnvironmentProblem("unsloth has kernels of its own")
        if kernels == "fused":
            use_fused_lora(model)
        elif kernels == "liger":
            _use_liger(model, device)
        else:
            _compile_layers(model)
        if kernels_of(model) != kernels:
            raise EnvironmentProblem("they support no layer of this model")
        pairs = zip(_loss_and_gradients(model, device, autocast), expected, strict=True)
        differences = [float((value - reference).norm() / reference.norm()) for value, reference in pairs]
        dtype = autocast or next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        allowed = TOLERANCE[str(dtype).removeprefix("torch.")]
        if not all(difference <= allowed for difference in differences):  # a NaN is not
            amounts = " and ".join(f"{difference:.1e}" for difference in differences)
            what = f"loss and gradients differ by {amounts}, where {allowed:.0e} is allowed in {dtype}"
            raise EnvironmentProblem(what)
    except Exception as error:  # a compiler, a kernel or a driver raises anything
        restore_plain_layers(model)
        reason = error.what if isinstance(error, EnvironmentProblem) else f"{type(error).__name__}: {one_line(error)}"
        raise EnvironmentProblem(
            f"train.kernels is {kernels}, which cannot be used here: {reason}",
            where="train.kernels",
            fix="--set train.kernels=plain",
        ) from error


def _loss_and_gradients(model: Any, device: str, autocast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Loss and gradients of one short row without dropout; of each weight the first 65,536 numbers."""
    import torch

    ids, training = torch.arange(3, 20, device=device)[None], model.training
    with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
        try:
            model.eval()
            with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            weights = [weight for weight in model.parameters() if weight.grad is not None]
            gradients = torch.cat([weight.grad.flatten()[: 1 << 16].double() for weight in weights])
            return loss.detach().double(), gradients
        finally:
            model.zero_grad(set_to_none=True)
            model.train(training)


def restore_plain_layers(model: nn.Module) -> None:
    """Every module computes as its class does again."""
    for module in model.modules():
        if hasattr(module.__dict__.get("forward"), "sft_kernels"):
            del module.forward


def kernels_of(model: nn.Module) -> Kernels:
    """The kernels that the model's layers use now."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return next((name for forward in forwards if (name := getattr(forward, "sft_kernels", None))), PLAIN)


def compiler_failed(error: BaseException) -> bool:
    """Whether torch.compile failed, at the first or a later shape, forward or backward."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def use_fused_lora(model: nn.Module) -> None:
    """Every LoRA layer with one adapter as one function with its own backward pass; DoRA and others stay as they are.

    peft casts a layer's input to fp32 and back, draws dropout one number at a time on one core, and stores several
    tensors of the input's size. On a CPU that takes longer than the layer's own product of matrices.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and is_linear(module.get_base_layer()):
            names = module.active_adapters
            is_plain = len(names) == 1 and names[0] in module.lora_A and not module.lora_variant
            if is_plain and not module.lora_bias[names[0]]:
                _set_forward(module, functools.partial(_fused_lora, module, module.forward, names[0]), "fused")


def _fused_lora(layer: Any, plain: Callable[..., Tensor], name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output of a LoRA layer, as its own forward computes it. x [..., in] to [..., out]."""
    import torch

    from sft.model.lora import LoraUpdate

    if layer.disable_adapters or layer.merged or kwargs:
        return plain(x, *args, **kwargs)
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if hasattr(layer, "first_a"):  # `adapters` subtracts these elsewhere; one product rounds once
        a, b = torch.cat([a, layer.first_a]), torch.cat([b, -layer.first_b], dim=1)
    result: Tensor = LoraUpdate.apply(layer.base_layer(x, *args), x, a, b, layer.scaling[name], dropout)  # type: ignore[no-untyped-call]
    return result


def _use_liger(model: nn.Module, device: str) -> None:
    """Liger's norms and gated MLPs on the modules of this model only.

    Its rotation is left out, as it can only be replaced for the whole process, and so is its loss, for the loss head is
    ours (`step/loss.py`). Liger also replaces classes in the model's Python module, which is undone.
    """
    from transformers.integrations.liger import apply_liger_kernel

    if importlib.util.find_spec("liger_kernel") is None:
        raise EnvironmentProblem("liger-kernel is not installed (pip install liger-kernel)")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise EnvironmentProblem("Liger's kernels need a CUDA GPU")
    before = {module for module in model.modules() if "forward" in module.__dict__}
    classes = [vars(sys.modules[name]) for name in {type(module).__module__ for module in model.modules()}]
    originals = [dict(namespace) for namespace in classes]
    apply_liger_kernel(model, {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False})
    for namespace, original in zip(classes, originals, strict=True):
        namespace.update(original)
    for module in model.modules():
        if "forward" in module.__dict__ and module not in before:
            _set_forward(module, module.__dict__.pop("forward"), "liger")


def _compile_layers(model: nn.Module) -> None:
    """Each decoder (or encoder) layer compiled for any length; dropout draws the numbers that it draws uncompiled."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            compiled = torch.compile(module.forward, dynamic=True, options={"fallback_random": True})
            _set_forward(module, compiled, "compiled")


def _set_forward(module: nn.Module, faster: Callable[..., Any], kernels: Kernels) -> None:
    """`faster` where gradients are formed, the class's own forward elsewhere."""
    import torch

    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (faster if torch.is_grad_enabled() else plain)(*args, **kwargs)

    forward.sft_kernels = kernels  # type: ignore[attr-defined]
    module.forward = forward  # type: ignore[method-assign]
