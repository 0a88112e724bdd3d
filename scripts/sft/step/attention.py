"""Attention that keeps the rows of one flat sequence apart, without padding and without the flash-attn package.

Registered with transformers under the name `sft_rows`. Where `position_ids` restart and no mask is given, transformers
tells the mask function that rows are packed; ours proves that the mask asked for is causal within each row, and hands
on the rows' boundaries in its place. The attention function then runs each row for itself: by `varlen_attn` on CUDA
(16-bit, Ampere and newer), by causal SDPA row by row elsewhere. Everything else (padding, a cache while generating,
windows that bind, chunks) goes to transformers' own SDPA functions, which are right in every case.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sft.step import unwrap

NAME = "sft_rows"
log = logging.getLogger("sft.step")
_kept_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def register() -> None:
    """Makes `attn_implementation="sft_rows"` known to transformers; again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, torch.compiler.disable(rows_attention))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(NAME, rows_mask)


def implementation(device: str | torch.device, config: Any) -> str | None:
    """`sft_rows` where it can serve this model on this device, registered; else None: groups of like length it is.

    config: the model's, as a transformers config or as the mapping of its config.json. Refused: encoder-decoders,
    families that do not take their attention from transformers' interface, and attention with a soft cap or sinks,
    which SDPA would ignore in silence (see `fallback`).
    """
    if not serves(config) or (torch.device(device).type == "cuda" and not _varlen_serves()):
        return None
    if torch.device(device).type not in ("cuda", "cpu"):
        return None
    register()
    return NAME


def serves(config: Any) -> bool:
    """Whether `sft_rows` can serve this family at all; the device is another matter."""
    config = _as_config(config)
    if config is None or getattr(config, "is_encoder_decoder", False) or _special(config):
        return False
    return _takes_interface(config)


def fallback(config: Any) -> str:
    """What to load a model with where `implementation` says None: `sdpa`; `eager` for caps, sinks, and BLOOM's like."""
    config = _as_config(config)
    return "sdpa" if config is None or (not _special(config) and _has_sdpa(config)) else "eager"


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether this very model may be fed padding-free: it runs `sft_rows`, and two packed rows are proven apart.

    The proof is three tiny forwards, once a model: another first row must leave the second one's logits as they were,
    and these must be the logits of that row alone. It catches what a name cannot: recurrent layers, ALiBi, positions
    that are ignored.
    """
    base = unwrap(model)
    if getattr(getattr(base, "config", None), "_attn_implementation", None) != NAME:
        return False
    if base not in _kept_apart:
        _kept_apart[base] = _proven(base)
        if not _kept_apart[base]:
            log.warning("this model does not keep packed rows apart: micro-batches are padded instead")
    return _kept_apart[base]


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
    found: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )
    return found


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
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.ndim != 1:
        done: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return done
    if query.is_cuda and dropout == 0 and (half := _half(query)) is not None and _kernel_width(query):
        return _varlen(query.to(half), key.to(half), value.to(half), attention_mask, scaling), None
    lengths = attention_mask.diff().tolist()
    split = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
    parts = [
        sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for q, k, v in zip(*split, strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _row_bounds(mask_function: Callable[..., Tensor], length: int, device: torch.device) -> Tensor | None:
    """Boundaries if the mask is causal within each row; None if it is anything else (a window that binds, chunks)."""
    here, zero = torch.arange(length, device=device), torch.zeros((), dtype=torch.long, device=device)
    joined = mask_function(zero, zero, here[1:], here[:-1])
    looks_ahead = mask_function(zero, zero, here[:-1], here[1:])
    ends = torch.cat([(~joined).nonzero()[:, 0], here[-1:]])
    starts = torch.cat([here[:1], ends[:-1] + 1])
    if bool(looks_ahead.any()) or not bool(mask_function(zero, zero, ends, starts).all()):
        return None
    bounds = torch.cat([starts, here[-1:] + 1]).to(torch.int32)
    bounds.longest = int(bounds.diff().max())  # type: ignore[attr-defined]  # spares each layer a device sync
    return bounds


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # in torch 2.11 it shares keys among heads unasked

    longest = getattr(bounds, "longest", None) or int(bounds.diff().max())
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    more: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _takes(varlen_attn) else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **more)
    assert isinstance(out, Tensor)
    return out[None]


def _half(query: Tensor) -> torch.dtype | None:
    """The 16-bit type to attend in: autocast's (a norm of fp32 weights hands over fp32), else the query's own."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def _kernel_width(query: Tensor) -> bool:
    return query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _varlen_serves() -> bool:
    if not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability()[0] < 8:
        return _padded("a GPU of compute capability 8.0 (Ampere)")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _padded("torch 2.11")
    return {"window_size", "scale"} <= _takes(varlen_attn) or _padded("torch 2.11")


@functools.cache
def _padded(needs: str) -> bool:
    log.warning("micro-batches are padded, in groups of like length: packing rows on a GPU needs %s or newer", needs)
    return False


@functools.cache
def _takes(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _as_config(config: Any) -> Any:
    """A transformers config of `config`; None for a family that transformers does not know."""
    from transformers import AutoConfig

    if not isinstance(config, Mapping):
        return config
    try:
        return AutoConfig.for_model(**config)
    except (ValueError, KeyError, TypeError):
        return None


def _special(config: Any) -> bool:
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) or getattr(text, "attn_soft_cap", None)
    return bool(capped) or text.model_type.startswith("gpt_oss")


def _has_sdpa(config: Any) -> bool:
    from transformers.models.auto import modeling_auto as auto

    kinds = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    family = next((kind[type(config)] for kind in kinds if type(config) in kind), None)
    return family is None or bool(getattr(family, "_supports_sdpa", False))


def _takes_interface(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(
        family is not None
        and getattr(family, "_supports_attention_backend", False)
        and getattr(family, "_supports_sdpa", False)
    )


def _proven(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    first = torch.arange(1, 6, device=device)
    second = torch.arange(2, 9, device=device).flip(0)
    positions = torch.cat([torch.arange(5, device=device), torch.arange(7, device=device)])[None]
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:  # 4-bit layers stay in training mode: on a CPU they repack themselves for good otherwise
        module.training = hasattr(module, "quant_state")
    try:
        with torch.no_grad():
            packed, other = (
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
    moved, off = (other - packed).float().norm(), (alone - packed).float().norm()
    exact = alone.dtype in (torch.float32, torch.float64)
    return bool(moved <= 1e-3 * size) and bool(off <= (1e-3 if exact else 5e-2) * size)
