"""Cross-entropy of each labelled token, the head computed in tiles so that full logits never exist.

`tiled_cross_entropy` catches the hidden states that a model gives its head, then computes the head, the loss and its
gradient on `tile` labelled positions at a time. Heads that are more than one matrix are recomputed tile by tile;
models that change their logits in an unknown way keep full logits (`full_cross_entropy` is the reference).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sft.model import adapters
from sft.model.adapters import unwrap
from sft.step.batch import IGNORED

WIDE_ROWS = 64  # positions whose logits are in fp32 at a time: 12 MB at a vocabulary of 49,152, which a CPU caches
log = logging.getLogger("sft.step")


@dataclass(frozen=True)
class LogitTransform:
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


@dataclass(frozen=True)
class TokenLoss:
    """The loss of one token: cross-entropy + z_loss * logsumexp(logits)^2.

    smoothing: the target is 1 - smoothing on the token and the rest spread evenly over the vocabulary (Szegedy et al.,
    2016). z_loss: keeps the logits' normaliser near 1 (PaLM, Chowdhery et al., 2022: 1e-4). dft: cross-entropy times
    the token's probability, which is not differentiated (dynamic fine-tuning, arXiv 2508.05629); not with smoothing.
    """

    smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False


CROSS_ENTROPY = TokenLoss()
IDENTITY = LogitTransform()
# The transform of each model seen so far; None if it is unknown, and the loss uses full logits.
_transforms: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of losses: fp32, or fp64 for a model in fp64."""
    return torch.promote_types(dtype, torch.float32)


def cross_entropy(logits: Tensor, targets: Tensor, loss: TokenLoss = CROSS_ENTROPY) -> Tensor:
    """The loss of each position [N]. logits [N, V] of any precision, targets [N]; of an ignored one no use is made."""
    logits = logits.to(loss_dtype(logits.dtype))
    losses = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=loss.smoothing)
    if loss.dft:
        losses = losses * losses.detach().neg().exp()
    return losses + loss.z_loss * logits.logsumexp(dim=-1).square() if loss.z_loss else losses


def full_cross_entropy(
    model: nn.Module,
    inputs: dict[str, Any],
    targets: Tensor,
    loss: TokenLoss = CROSS_ENTROPY,
    weights: Tensor | None = None,
    *,
    labelled_only: bool = False,
) -> Tensor:
    """Losses [N] of the N labelled positions of `targets` [B, L], times their `weights` [B, L], from the model's full
    logits.

    All logits are taken to fp32 at once, as a plain loop does; with `labelled_only` those of labelled positions only.
    """
    logits, labelled = model(**inputs, use_cache=False).logits, targets != IGNORED
    if labelled_only:
        losses = cross_entropy(logits[labelled], targets[labelled], loss)
    else:
        losses = cross_entropy(logits.flatten(0, -2), targets.flatten(), loss)[labelled.flatten()]
    return losses if weights is None else losses * weights[labelled]


def tiled_cross_entropy(
    model: nn.Module,
    inputs: dict[str, Any],
    targets: Tensor,
    loss: TokenLoss = CROSS_ENTROPY,
    weights: Tensor | None = None,
    *,
    tile: int,
) -> Tensor:
    """The same losses [N], the head computed on `tile` labelled positions at a time."""
    base = unwrap(model)
    head = adapters.head(base)
    if head is None or _transforms.get(base, IDENTITY) is None:
        return full_cross_entropy(model, inputs, targets, loss, weights, labelled_only=True)
    hidden, raw, logits = _run_to_head(model, head, inputs, positions=0 if base in _transforms else 1)
    if hidden is None or raw is None or hidden.shape[:2] != targets.shape:
        _transforms[base] = None
    elif base not in _transforms and bool(raw.isfinite().all()):  # NaN shows nothing, and differs between ranks
        _transforms[base] = _find_transform(base, raw, logits)
    transform = _transforms.get(base, IDENTITY)
    if transform is None or hidden is None or raw is None:
        log.warning("%s computes its logits in an unknown way: the loss uses full logits", type(base).__name__)
        return full_cross_entropy(model, inputs, targets, loss, weights, labelled_only=True)
    labelled = targets != IGNORED
    hidden, targets, weights = hidden[labelled], targets[labelled], None if weights is None else weights[labelled]
    if not len(targets):
        return hidden[:, 0].to(loss_dtype(hidden.dtype))  # empty, and part of the graph
    linear = _plain_linear(head)
    if linear is None or linear.weight.device != hidden.device:
        losses = _recomputed_tiles(head, hidden, targets, transform, tile, loss, raw.dtype)
        return losses if weights is None else losses * weights
    tiles: Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.to(raw.dtype), linear.weight, linear.bias, targets, weights, transform, tile, loss,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return tiles


def tile_gradient_(raw: Tensor, targets: Tensor, transform: LogitTransform, loss: TokenLoss) -> Tensor:
    """The losses [n] of one tile; overwrites `raw` [n, V] (fp32 or fp64) with the gradient of their sum to it."""
    logits = transform(raw) if transform != IDENTITY else raw
    slope = None
    if transform.softcap:
        slope = (1 - (logits / transform.softcap).square()) * transform.scale
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    smoothing, mean = loss.smoothing, logits.mean(dim=1) if loss.smoothing else 0.0
    top = logits.amax(dim=1, keepdim=True)
    torch.sub(logits, top, out=raw).exp_()
    total = raw.sum(dim=1, keepdim=True)
    normalizer = (top + total.log())[:, 0]
    losses = normalizer - (1 - smoothing) * target_logits - smoothing * mean
    raw.div_(total)
    share = losses.neg().exp() if loss.dft else torch.ones_like(losses)  # of cross-entropy in the token's loss
    if loss.dft or loss.z_loss:
        losses = share * losses + loss.z_loss * normalizer.square()
        raw.mul_((share + 2 * loss.z_loss * normalizer)[:, None])
    if smoothing:
        raw.sub_(smoothing / raw.shape[1])
    raw.scatter_add_(1, targets[:, None], ((smoothing - 1) * share)[:, None])
    if slope is not None:
        raw.mul_(slope)
    elif transform.scale != 1.0:
        raw.mul_(transform.scale)
    return losses


class _TiledCrossEntropy(torch.autograd.Function):
    """Losses [N] of `transform(hidden @ weight.T + bias)`; all gradients formed in the forward pass.

    hidden [N, h] in the precision to compute in, weight [V, h], bias [V] or None, targets [N], weights of the losses
    [N] or None. In 16-bit, two bytes a
    logit of one tile are alive at a time, and four of WIDE_ROWS positions; gradients of hidden in its own precision, of
    weight and bias in fp32.
    The gradient of hidden is exact for any upstream gradient [N]. Those of weight and bias are formed for equal ones
    (`losses.sum()`, scaled); for others the tiles are computed once more in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        transform: LogitTransform,
        tile: int,
        loss: TokenLoss,
        grad_enabled: bool,
    ) -> Tensor:
        needs = tuple(grad_enabled and need for need in ctx.needs_input_grad[:3])
        losses, ctx.grads = _compute_tiles(hidden, weight, bias, targets, transform, tile, loss, needs, weights)
        ctx.again = None
        if needs[1] or needs[2]:
            ctx.again = lambda upstream: _compute_tiles(
                hidden, weight, bias, targets, transform, tile, loss, (False, *needs[1:]),
                upstream if weights is None else upstream * weights,
            )[1]  # fmt: skip
        return losses if weights is None else losses * weights

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        grad_hidden, grad_weight, grad_bias = ctx.grads
        uniform = scale.numel() == 1 or scale.stride(0) == 0  # the gradient of a sum is expanded from one number
        if grad_hidden is not None:
            grad_hidden.mul_(scale[0] if uniform else scale[:, None])
        if not uniform and ctx.again is not None:
            _, grad_weight, grad_bias = ctx.again(scale)
        else:
            for grad in (grad_weight, grad_bias):
                if grad is not None:
                    grad.mul_(scale[0])
        ctx.grads = ctx.again = None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _compute_tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    tile: int,
    loss: TokenLoss,
    needs: tuple[bool, ...],
    upstream: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Losses [N] and the gradients, where needed, of hidden, weight and bias for `upstream` [N] (ones by default)."""
    dtype, wide = hidden.dtype, loss_dtype(hidden.dtype)
    matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
    grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needs[2] else None
    losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(targets), tile):
            part = slice(start, start + tile)
            gradient = functional.linear(hidden[part], matrix, offset)  # the logits, overwritten by their gradient
            for index, logits in enumerate(torch.split(gradient, WIDE_ROWS)):
                first = start + index * WIDE_ROWS
                rows, scores = slice(first, first + len(logits)), logits.to(wide)
                losses[rows] = tile_gradient_(scores, targets[rows], transform, loss)
                if upstream is not None:
                    scores.mul_(upstream[rows, None])
                if grad_bias is not None:
                    grad_bias += scores.sum(0)
                if any(needs):
                    logits.copy_(scores)
                del scores
            if grad_hidden is not None:
                torch.mm(gradient, matrix, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += gradient.t() @ hidden[part]
            del gradient
    return losses, (grad_hidden, grad_weight, grad_bias)


def _recomputed_tiles(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    tile: int,
    loss: TokenLoss,
    dtype: torch.dtype,
) -> Tensor:
    """The same losses through a head that is more than one matrix (an adapter on it, 4-bit): tiles are recomputed."""

    def losses_of(hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            scores = head(hidden)
        return cross_entropy(transform(scores.to(loss_dtype(scores.dtype))), targets, loss)

    parts = [
        checkpoint(losses_of, hidden[start : start + tile], targets[start : start + tile], use_reentrant=False)
        for start in range(0, len(targets), tile)
    ]
    return torch.cat(parts)


def _run_to_head(
    model: nn.Module, head: nn.Module, inputs: dict[str, Any], *, positions: int
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The head's input [B, L, h], and the logits of its first positions: the head's output and the model's.

    The first two are None if the model does not call its head exactly once. positions: 0 where the logits are not
    needed: on a CPU a single one would cost a copy of the whole head in bf16.
    """
    hidden_states: list[Tensor] = []
    outputs: list[Tensor] = []

    def pass_few_positions(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states.append(args[0])
        return (args[0][:1, :positions], *args[1:])

    def record(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)

    hooks = [head.register_forward_pre_hook(pass_few_positions), head.register_forward_hook(record)]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(hidden_states) == len(outputs) == 1:
        return hidden_states[0], outputs[0], logits
    return None, None, logits


def _find_transform(base: nn.Module, raw: Tensor, logits: Tensor) -> LogitTransform | None:
    """The transform that maps the head's output to the model's logits: the config's, or none; None for any other."""
    config = base.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    limit = 1e-5 if raw.dtype in (torch.float32, torch.float64) else 2e-2
    raw, logits = raw.detach().float(), logits.detach().float()
    for transform in (LogitTransform(float(scale), softcap), IDENTITY):
        if raw.shape == logits.shape:
            error = (transform(raw) - logits).abs().max() / logits.abs().max().clamp_min(1e-6)
            if float(error) <= limit:
                return transform
    return None


def _plain_linear(head: nn.Module) -> nn.Linear | None:
    """The head's only matrix, also behind peft's `modules_to_save`; None if the head is more than that."""
    saved = getattr(head, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        active = [name for name in getattr(head, "active_adapters", []) if name in saved]
        off = getattr(head, "disable_adapters", False) or not active
        head = head.original_module if off else saved[active[0]]  # type: ignore[assignment]
    return head if type(head) is nn.Linear else None
