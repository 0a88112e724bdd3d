"""Losses over logits: sums of cross-entropy in fp32, and the gradient of such a sum formed in place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sft.step import unwrap
from sft.step.batch import IGNORED


@dataclass(frozen=True)
class Transform:
    """What a model does to its head's output: `softcap * tanh(scale * z / softcap)`; identity by default.

    Gemma 2 caps (`final_logit_softcapping`), Cohere and Granite scale (`logit_scale`, `logits_scaling`).
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that losses are summed in: fp32, or fp64 for a model in fp64."""
    return torch.promote_types(dtype, torch.float32)


def cross_entropy_sum(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over positions of the cross-entropy. logits [N, V] of any precision, targets [N] without ignored ones.

    With smoothing e the target is (1 - e) on the token and e spread evenly over the vocabulary (Szegedy et al., 2016).
    """
    return functional.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="sum", label_smoothing=smoothing)


def tile_gradient_(raw: Tensor, targets: Tensor, transform: Transform, smoothing: float) -> Tensor:
    """Sum of cross-entropy over one tile; overwrites `raw` [n, V] (fp32 or fp64) with that sum's gradient to it."""
    logits = transform(raw) if transform != Transform() else raw
    bend = None
    if transform.softcap:
        bend = (1 - (logits / transform.softcap).square()) * transform.scale
    picked = logits.gather(1, targets[:, None])[:, 0]
    mean = logits.mean(dim=1) if smoothing else 0.0
    top = logits.amax(dim=1, keepdim=True)
    torch.sub(logits, top, out=raw).exp_()
    total = raw.sum(dim=1, keepdim=True)
    loss = (top + total.log())[:, 0] - (1 - smoothing) * picked - smoothing * mean
    raw.div_(total)
    if smoothing:
        raw.sub_(smoothing / raw.shape[1])
    raw.scatter_add_(1, targets[:, None], torch.full_like(picked, smoothing - 1)[:, None])
    if bend is not None:
        raw.mul_(bend)
    elif transform.scale != 1.0:
        raw.mul_(transform.scale)
    return loss.sum()


log = logging.getLogger("sft.step")
_transforms: WeakKeyDictionary[nn.Module, Transform | None] = WeakKeyDictionary()


def full_loss(model: nn.Module, inputs: dict[str, Any], targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum of cross-entropy at labelled positions as transformers' own loss forms it: all logits, in fp32, at once.

    The reference for values and memory: the model's output lives until the gradient is formed, as it does in a plain
    loop (`out = model(...); out.loss.backward()`), so 14 bytes a logit are alive in 16-bit.
    """
    logits = model(**inputs, use_cache=False).logits
    spread = logits.to(wide(logits.dtype)).flatten(0, -2)
    loss = functional.cross_entropy(spread, targets.flatten(), reduction="sum", label_smoothing=smoothing)
    kept: Tensor = _Keeping.apply(loss, logits)  # type: ignore[no-untyped-call]
    return kept


class _Keeping(torch.autograd.Function):
    """The loss as it is; the output that it came from stays until the backward pass is over."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor) -> Tensor:
        ctx.output = output
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


def _chosen_loss(model: nn.Module, inputs: dict[str, Any], targets: Tensor, smoothing: float) -> Tensor:
    """The same sum by the model's own logits, those of labelled positions alone taken up to fp32."""
    logits = model(**inputs, use_cache=False).logits
    chosen = targets != IGNORED
    return cross_entropy_sum(logits[chosen], targets[chosen], smoothing)


def chunked_loss(
    model: nn.Module, inputs: dict[str, Any], targets: Tensor, *, tile: int, smoothing: float = 0.0
) -> Tensor:
    """The same sum, the head run on `tile` labelled positions at a time."""
    base = unwrap(model)
    head = _head(base)
    if head is None or _transforms.get(base, Transform()) is None:
        return _chosen_loss(model, inputs, targets, smoothing)
    hidden, raw, logits = _run(model, head, inputs)
    if hidden is None or raw is None or hidden.shape[:2] != targets.shape:
        _transforms[base] = None
    elif base not in _transforms:
        _transforms[base] = _find_transform(base, raw, logits)
    transform = _transforms[base]
    if transform is None or hidden is None or raw is None:
        log.warning("%s: the head is not one we know, so full logits are kept", type(base).__name__)
        return _chosen_loss(model, inputs, targets, smoothing)
    chosen = targets != IGNORED
    rows, wanted = hidden[chosen], targets[chosen]
    if not len(wanted):
        return hidden[:, :, :0].sum().to(wide(hidden.dtype))
    plain = _plain_linear(head)
    if plain is None or plain.weight.device != rows.device:
        return _through_module(head, rows, wanted, transform, tile, smoothing, raw.dtype)
    total: Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows.to(raw.dtype), plain.weight, plain.bias, wanted, transform, tile, smoothing, torch.is_grad_enabled()
    )
    return total


class _TiledCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `transform(hidden @ weight.T + bias)`, summed; all gradients formed in the forward pass.

    hidden [N, h] in the precision to compute in, weight [V, h], bias [V] or None, targets [N]. Six bytes a logit of one
    tile are alive at a time in 16-bit; gradients of hidden in its own precision, of weight and bias in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        tile: int,
        smoothing: float,
        learning: bool,
    ) -> Tensor:
        wanted = [learning and need for need in ctx.needs_input_grad[:3]]
        dtype, keep = hidden.dtype, wide(hidden.dtype)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=keep, device=weight.device) if wanted[1] else None
        grad_bias = torch.zeros(weight.shape[0], dtype=keep, device=weight.device) if wanted[2] else None
        total = torch.zeros((), dtype=keep, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), tile):
                part = slice(start, start + tile)
                scores = functional.linear(hidden[part], matrix, offset).to(keep)
                total += tile_gradient_(scores, targets[part], transform, smoothing)
                if not any(wanted):
                    continue
                slope = scores.to(dtype)
                if grad_bias is not None:
                    grad_bias += scores.sum(0)
                del scores
                if grad_hidden is not None:
                    torch.mm(slope, matrix, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += slope.t() @ hidden[part]
                del slope
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else (grad * upstream[0]).to(grad.dtype) for grad in ctx.grads]
        ctx.grads = None
        return (*grads, None, None, None, None, None)


def _through_module(
    head: nn.Module, hidden: Tensor, targets: Tensor, transform: Transform, tile: int, smoothing: float, dtype: Any
) -> Tensor:
    """The same sum through a head that is more than one matrix (an adapter on it, 4-bit): tiles are recomputed."""

    def one(rows: Tensor, wanted: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            scores = head(rows)
        return cross_entropy_sum(transform(scores.to(wide(scores.dtype))), wanted, smoothing)

    parts = [
        checkpoint(one, hidden[start : start + tile], targets[start : start + tile], use_reentrant=False)
        for start in range(0, len(targets), tile)
    ]
    return torch.stack(parts).sum()


def _run(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Hidden states [B, L, h] that the head was given, and one position's logits: the head's own and the model's."""
    seen: list[Tensor] = []
    made: list[Tensor] = []

    def let_one_through(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:1, :1], *args[1:])

    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        made.append(output)

    hooks = [head.register_forward_pre_hook(let_one_through), head.register_forward_hook(keep)]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return (seen[0], made[0], logits) if len(seen) == len(made) == 1 else (None, None, logits)


def _find_transform(base: nn.Module, raw: Tensor, logits: Tensor) -> Transform | None:
    """The transform, of those that the config can mean, that takes the head's output to the model's logits."""
    if raw.shape != logits.shape:
        return None
    config = base.config.get_text_config()  # type: ignore[union-attr, operator]
    scale, division = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    candidates = [Transform()]
    for factor in (scale, 1 / division if division else None):
        if factor:
            candidates.append(Transform(scale=float(factor)))
    if cap := getattr(config, "final_logit_softcapping", None):
        candidates += [Transform(each.scale, float(cap)) for each in candidates]
    exact = raw.dtype in (torch.float32, torch.float64)
    raw, logits = raw.detach().float(), logits.detach().float()
    size = logits.abs().max().clamp_min(1e-6)
    errors = [float((candidate(raw) - logits).abs().max() / size) for candidate in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    limit = 1e-5 if exact else 2e-2
    return candidates[best] if errors[best] <= limit else None


def _head(base: nn.Module) -> nn.Module | None:
    try:
        found = base.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _plain_linear(head: nn.Module) -> nn.Linear | None:
    """The one matrix that the head is, looked for through peft's `modules_to_save`; None where it is more than that."""
    saved = getattr(head, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        active = [name for name in getattr(head, "active_adapters", []) if name in saved]
        off = getattr(head, "disable_adapters", False) or not active
        head = head.original_module if off else saved[active[0]]  # type: ignore[assignment]
    return head if type(head) is nn.Linear else None
