"""Attention that keeps the rows of one packed sequence apart, without padding and without the flash-attn package.

Registered with transformers as `sft_rows`. Where `position_ids` restart and no mask is given, transformers informs
the mask function that rows are packed; ours checks that the requested mask is causal within each row, and passes on the
rows' boundaries in its place. The attention function then runs each row by itself: `varlen_attn` on CUDA (16-bit,
Ampere and newer), causal SDPA row by row elsewhere. Everything else (padding, a cache while generating, sliding windows
that bind, chunks) goes to transformers' own SDPA functions.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sft.model.adapters import has_prefix, unwrap

NAME = "sft_rows"
SHORT = 256  # tokens: attention of longer rows in bf16 on a CPU is left to torch, which stores no probabilities
log = logging.getLogger("sft.step")
_verified: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def register() -> None:
    """Registers `attn_implementation="sft_rows"` with transformers; repeating it is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, torch.compiler.disable(rows_attention))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(NAME, rows_mask)


def choose(device: str | torch.device, config: Any) -> str:
    """The attention to load: `sft_rows`, registered, where it supports this model on this device. Else micro-batches
    are padded: `sdpa`; `eager` for soft caps, sinks and families without SDPA (BLOOM).

    config: the model's, as a transformers config or as the mapping of its config.json.
    """
    kind = torch.device(device).type
    on_gpu = kind == "cuda" and torch.cuda.is_available()
    if supports(config) and (kind == "cpu" or (on_gpu and _varlen_available(torch.cuda.get_device_capability(device)))):
        register()
        return NAME
    return padded(config)


def supports(config: Any) -> bool:
    """Whether `sft_rows` supports this family on some device.

    Not supported: encoder-decoders, families that do not take their attention from transformers' interface, and
    attention with a soft cap or sinks, which SDPA would silently ignore.
    """
    config, family = _family(config)
    interface = getattr(family, "_supports_attention_backend", False) and getattr(family, "_supports_sdpa", False)
    return bool(interface) and not config.is_encoder_decoder and not _needs_eager(config)


def padded(config: Any) -> str:
    """The attention for padded micro-batches: `sdpa` or `eager`."""
    config, family = _family(config)
    return "sdpa" if getattr(family, "_supports_sdpa", True) and not (config and _needs_eager(config)) else "eager"


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether packed rows may be fed to this model: it runs `sft_rows`, and a check shows that rows do not leak.

    The check is three tiny forward passes, once a model: another first row must leave the second row's logits as they
    were, and these must be the logits of that row alone. It catches what a name cannot: recurrent layers, ALiBi,
    ignored positions.
    """
    base = unwrap(model)
    if has_prefix(model):  # every row needs the prefix in front of it
        return False
    if getattr(getattr(base, "config", None), "_attn_implementation", None) != NAME:
        return False
    if base not in _verified:
        _verified[base] = _passes_leak_check(base)
        if not _verified[base]:
            log.warning("this model lets packed rows attend to each other: micro-batches are padded instead")
    return _verified[base]


def rows_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The boundaries of packed rows, int32 [R + 1] from 0 to T; else the mask that SDPA takes (a tensor or None)."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    packed = not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap", False)
    if packed and batch_size == 1 and attention_mask is None and q_length == kv_length and q_length > 1:
        bounds = _row_bounds(mask_function, q_length, kwargs.get("device", torch.device("cpu")))
        if bounds is not None:
            return bounds
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )
    return mask


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [B, heads, T, width] to [B, T, heads, width]; a one-dimensional mask is the rows' boundaries."""
    if attention_mask is None or attention_mask.ndim != 1:
        one_query = query.shape[2] == 1 and not query.requires_grad and dropout == 0
        if one_query and query.device.type == "cpu":
            return _one_query(query, key, value, attention_mask, scaling), None
        return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs), None
    width = query.shape[-1]
    if query.is_cuda and dropout == 0 and width <= 256 and width % 8 == 0 and (half := _half(query)) is not None:
        return _varlen(query.to(half), key.to(half), value.to(half), attention_mask, scaling), None
    return row_by_row(module, query, key, value, attention_mask.diff().tolist(), dropout, scaling), None


def row_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Causal attention within each row of a packed sequence: [1, heads, T, width] to [1, T, heads, width]."""
    rows = zip(*(torch.split(tensor, list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
    parts = [_sdpa(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True) for q, k, v in rows]
    return torch.cat(parts, dim=1)


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """transformers' SDPA attention, [B, heads, T, width] to [B, T, heads, width], or `_ShortRows` on a CPU."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    short = query.dtype == torch.bfloat16 and query.shape[2] == key.shape[2] <= SHORT and not query.is_cuda
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if short and causal and mask is None and not kwargs["dropout"]:
        scaling = query.shape[-1] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
        rows: Tensor = _ShortRows.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
        return rows
    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return out


class _ShortRows(torch.autograd.Function):
    """Causal attention as plain matrix products, [B, heads, T, width] and keys of fewer heads to [B, T, heads, width].

    Scores and softmax are in fp32, as in torch's kernel, whose backward pass takes 4 times as long at 100 tokens.
    Stored: the inputs, and the probabilities in their type, [B, heads, T, T].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, length, width = query.shape
        grouped = query.reshape(
            batch, key.shape[1], -1, width
        )  # the queries that share a key's head, one after another
        with torch.autocast("cpu", enabled=False):
            scores = grouped.float().mul_(scaling) @ key.float().transpose(-1, -2)
            hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
            scores.view(batch, -1, length, length).masked_fill_(hidden, -math.inf)
            weights = scores.softmax(dim=-1).to(value.dtype)
            out = weights @ value
        ctx.save_for_backward(grouped, key, value, weights)
        ctx.scaling = scaling
        return out.view(batch, heads, length, width).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grouped, key, value, weights = ctx.saved_tensors
        batch, length, heads, width = grads[0].shape
        grad = grads[0].transpose(1, 2).reshape(grouped.shape)
        grad_value = weights.transpose(-1, -2) @ grad
        grad_weights, weights = (grad @ value.transpose(-1, -2)).float(), weights.float()
        share = (grad_weights * weights).sum(dim=-1, keepdim=True)
        grad_scores = grad_weights.sub_(share).mul_(weights).mul_(ctx.scaling).to(key.dtype)
        grad_query = (grad_scores @ key).view(batch, heads, length, width)
        return grad_query, grad_scores.transpose(-1, -2) @ grouped, grad_value, None


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of one query a row, [B, heads, 1, width] to [B, 1, heads, width], as plain matrix products.

    torch's kernel for the CPU is made for long queries: 32 rows of 100 keys in bfloat16 take 7.5 ms there, 0.3 ms here
    (scores in float32, weights in the values' type, in both). mask: bool, true where a key is seen.
    """
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width).float() * (width**-0.5 if scaling is None else scaling)
    with torch.autocast("cpu", enabled=False):  # which would compute the scores in bfloat16
        scores = grouped @ key.float().transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        return (scores.softmax(dim=-1).to(value.dtype) @ value).reshape(batch, 1, heads, width)


def _row_bounds(mask_function: Callable[..., Tensor], length: int, device: torch.device) -> Tensor | None:
    """Boundaries if the mask is causal within each row; None if it is anything else (a window that binds, chunks)."""
    positions, zero = torch.arange(length, device=device), torch.zeros((), dtype=torch.long, device=device)
    sees_previous = mask_function(zero, zero, positions[1:], positions[:-1])
    sees_next = mask_function(zero, zero, positions[:-1], positions[1:])
    ends = torch.cat([(~sees_previous).nonzero()[:, 0], positions[-1:]])
    starts = torch.cat([positions[:1], ends[:-1] + 1])
    if bool(sees_next.any()) or not bool(mask_function(zero, zero, ends, starts).all()):
        return None
    bounds = torch.cat([starts, positions[-1:] + 1]).to(torch.int32)
    bounds.longest = int(bounds.diff().max())  # type: ignore[attr-defined]  # spares each layer a device sync
    return bounds


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.11 has no enable_gqa and shares keys among heads anyway

    longest = getattr(bounds, "longest", None) or int(bounds.diff().max())
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    gqa: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _parameters(varlen_attn) else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **gqa)
    assert isinstance(out, Tensor)
    return out[None]


def _half(query: Tensor) -> torch.dtype | None:
    """The 16-bit type to attend in: autocast's (a norm of fp32 weights returns fp32), else the query's own."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


@functools.cache
def _varlen_available(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this capability and this torch have the kernel; warns where they have not."""
    from torch.nn.attention.varlen import varlen_attn

    if capability[0] < 8:
        missing = "a GPU of compute capability 8.0 (Ampere)"
    elif not {"window_size", "scale"} <= _parameters(varlen_attn):
        missing = "torch 2.11"
    else:
        return True
    log.warning("micro-batches are padded: packing rows on a GPU needs %s or newer", missing)
    return False


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _family(config: Any) -> tuple[Any, Any]:
    """A transformers config of `config` and the class that generates text with it; None for what is unknown."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    if isinstance(config, Mapping):
        try:
            config = AutoConfig.for_model(**config)
        except (ValueError, KeyError, TypeError):
            return None, None
    mappings = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    return config, next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)


def _needs_eager(config: Any) -> bool:
    """Whether attention has a soft cap or sinks, which SDPA would ignore."""
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) or getattr(text, "attn_soft_cap", None)
    return bool(capped) or text.model_type.startswith("gpt_oss")


def _passes_leak_check(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    first = torch.arange(1, 6, device=device)
    second = torch.arange(2, 9, device=device).flip(0)
    positions = torch.cat([torch.arange(5, device=device), torch.arange(7, device=device)])[None]
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:  # 4-bit layers stay in training mode: on a CPU evaluation repacks them for good
        module.training = hasattr(module, "quant_state")
    try:
        with torch.no_grad():
            packed, other_first = (
                model(input_ids=torch.cat([row, second])[None], position_ids=positions, use_cache=False).logits[0, 5:]
                for row in (first, first + 3)
            )
            alone = model(input_ids=second[None], use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.debug("packed rows refused by the model: %s", error)
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    size = alone.float().norm()
    leaked, off = (other_first - packed).float().norm(), (alone - packed).float().norm()
    exact = alone.dtype in (torch.float32, torch.float64)
    return bool(leaked <= 1e-3 * size) and bool(off <= (1e-3 if exact else 5e-2) * size)
