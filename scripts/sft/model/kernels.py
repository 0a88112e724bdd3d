"""Faster ways to compute a layer: Liger's kernels, torch.compile. Taken by one model's own modules, and given back.

No class is touched, no module is added, so weights keep their names. The faster way serves where gradients are formed;
evaluation and generation compute plainly, as `eval`, `infer` and a merged model do. `training.ways` finds out
whether a way is right and worth it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import nn

Way = Literal["plain", "liger", "compiled"]
Forward = Callable[..., Any]
PLAIN, LIGER, COMPILED = get_args(Way)
ROPE = "apply_rotary_pos_emb"
SILU, GELU = {"SiLU", "SiLUActivation"}, {"GELUTanh", "PytorchGELUTanh"}


def why_not(model: Any, way: Way, *, device: str) -> str | None:
    """What stands against computing this transformers model so; None where nothing is known to."""
    if way != LIGER:
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Liger's kernels need a CUDA GPU"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as FAMILIES
    except Exception as error:  # it asks for some transformers and some Triton
        return f"importing liger_kernel fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    family = model.config.model_type
    return None if family in FAMILIES else f"Liger has no kernels for {family} models"


def take(model: nn.Module, way: Way) -> None:
    """Computes the layers of `model`, wrappers included, this way from here on. Not proven yet."""
    give_back(model)
    if way != PLAIN:
        find = _compiled if way == COMPILED else _liger
        for module in list(model.modules()):
            if (faster := find(module)) is not None:
                _put(module, faster, way)


def give_back(model: nn.Module) -> None:
    """Every module computes as its class does again."""
    for module in model.modules():
        if hasattr(module.__dict__.get("forward"), "sft_way"):
            del module.forward


def way_of(model: nn.Module) -> Way:
    """How the layers are computed now."""
    ways = (getattr(module.__dict__.get("forward"), "sft_way", None) for module in model.modules())
    found: Way = next(filter(None, ways), PLAIN)
    return found


def compiler_failed(error: BaseException) -> bool:
    """Whether it is torch.compile that failed, at the first or a later shape, forward or backward."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _put(module: nn.Module, faster: Forward, way: Way) -> None:
    import torch

    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (faster if torch.is_grad_enabled() else plain)(*args, **kwargs)

    forward.sft_way = way  # type: ignore[attr-defined]
    module.forward = forward  # type: ignore[method-assign]


def _compiled(module: nn.Module) -> Forward | None:
    """A decoder (or encoder) layer, compiled for any length. Dropout draws the numbers that it draws uncompiled."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not isinstance(module, GradientCheckpointingLayer):
        return None
    made: Forward = torch.compile(module.forward, dynamic=True, options={"fallback_random": True})
    return made


def _liger(module: nn.Module) -> Forward | None:
    """Liger's forward of a norm, a gated MLP or an attention that turns queries and keys; None of any other module."""
    if type(module).__name__.endswith("RMSNorm"):
        return _norm(module)
    parts = [callable(getattr(module, name, None)) for name in ("down_proj", "gate_proj", "gate_up_proj")]
    if parts[0] and any(parts[1:]):  # layers: experts keep all of theirs in one tensor
        return _gated(module)
    return _turning(module)


def _norm(module: Any) -> Forward | None:
    import torch
    from liger_kernel.ops import LigerRMSNormFunction

    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None:
        return None
    with torch.no_grad():  # a row of ones comes out as what it is scaled by: the weight, or 1 + the weight
        offset = float((module(torch.ones_like(weight)) - weight).float().mean().round())
    casting = "gemma" if offset else "llama"

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype != module.weight.dtype:
            return type(module).forward(module, hidden)  # type: ignore[no-any-return]
        made: torch.Tensor = LigerRMSNormFunction.apply(hidden, module.weight, eps, offset, casting, False, None)
        return made

    return forward


def _gated(module: Any) -> Forward | None:
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    act = type(getattr(module, "act_fn", getattr(module, "activation_fn", None))).__name__
    if act not in SILU | GELU:
        return None

    def forward(hidden: Any) -> Any:
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(hidden).chunk(2, dim=-1)
        else:
            gate, up = module.gate_proj(hidden), module.up_proj(hidden)
        if act in SILU:
            return module.down_proj(LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0))
        return module.down_proj(LigerGELUMulFunction.apply(gate, up))

    return forward


def _turning(module: nn.Module) -> Forward | None:
    """The class's own forward, in which the one name of the rotation means Liger's."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    own = type(module).forward
    code, turn = getattr(own, "__code__", None), getattr(own, "__globals__", {}).get(ROPE)
    if turn is None or code is None or ROPE not in code.co_names or not _turns_alike(turn, _device(module)):
        return None
    names = {**own.__globals__, ROPE: liger_rotary_pos_emb}
    turned = FunctionType(code, names, own.__name__, own.__defaults__, own.__closure__)
    turned.__kwdefaults__ = own.__kwdefaults__
    made: Forward = turned.__get__(module)
    return made


@lru_cache
def _turns_alike(turn: Forward, device: Any) -> bool:
    """Whether this family's rotation is Liger's, halves against each other: some turn neighbours (GLM, Cohere).

    In fp32, since the difference can be smaller than what 16-bit sums leave of a whole model's gradients.
    """
    import torch
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    drawn = torch.linspace(0, 7, 2 * 5 * 16, device=device).cos().view(1, 2, 5, 16)  # [B, heads, T, width]
    angle = torch.linspace(0, 3, 5 * 8, device=device).view(1, 5, 8).repeat(1, 1, 2)
    given = drawn, drawn.flip(-1), angle.cos(), angle.sin()
    theirs = liger_rotary_pos_emb(*(each.clone() for each in given))  # it works in place
    try:
        ours = turn(*given)
    except (TypeError, RuntimeError):
        return False
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def _device(module: nn.Module) -> Any:
    return next(module.parameters()).device
