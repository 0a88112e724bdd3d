"""Models of real shapes with random weights, quantised to NF4 on the device: nothing is read or downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from sft.config.schema import Config
from sft.memory import shapes
from sft.model.adapters import unwrap
from sft.step import attention

QWEN = {  # hidden, feed-forward, layers, heads, key-value heads, tied: config.json of Qwen2.5
    "tiny": (64, 128, 2, 4, 2, True),
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "14B": (5120, 13824, 48, 40, 8, False),
    "32B": (5120, 27648, 64, 40, 8, False),
}


def qwen(size: str) -> dict[str, Any]:
    """The config.json of a Qwen2.5 of this size."""
    hidden, ffn, layers, heads, keys, tied = QWEN[size]
    return {
        "model_type": "qwen2",
        "vocab_size": 2048 if size == "tiny" else 152064 if not tied else 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }


def settings(mode: str, length: int, **train: Any) -> Config:
    """Our config for a model without a name: `mode`, rows of `length` tokens, settings of `train`."""
    raw = {
        "model": {"name": "-", "max_seq_len": length},
        "tuning": {"mode": mode, "lora": {"r": 16, "alpha": 32, "dropout": 0.0}},
        "train": {"bf16": True, "gradient_checkpointing": True, "eval_strategy": "no", **train},
    }
    return Config.model_validate(raw)


def build(
    description: dict[str, Any], config: Config, device: str, *, checkpointing: bool = True, attn: str | None = None
) -> Any:
    """The model with its adapters on `device`, bf16 where it is not 4-bit, ready to train."""
    implementation = attn or attention.choose(device, description)
    attention.register()
    full = config.tuning.mode == "full"
    dtype = torch.float32 if full else torch.bfloat16
    model = shapes.meta_model(
        description, "-", config.tuning, dtype, attention=implementation, checkpointing=checkpointing
    )
    torch.manual_seed(0)
    weights: dict[int, Any] = {}
    for module in model.modules():
        _rotary(module, device)
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.is_meta:
                if id(weight) not in weights:
                    weights[id(weight)] = _real(module, name, weight, device)
                module._parameters[name] = weights[id(weight)]
    unbuilt = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if unbuilt:
        raise RuntimeError(f"not built: {unbuilt[:3]}")
    base: Any = unwrap(model)
    base.config.name_or_path = "-"
    if config.tuning.mode == "qlora":  # attributes of a loaded model, which transformers' trainer checks
        base.hf_quantizer = AutoHfQuantizer.from_config(
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
            pre_quantized=False,
        )
        base.is_quantized, base.quantization_method = True, base.hf_quantizer.quantization_config.quant_method
    return model.train()


def _real(module: nn.Module, name: str, weight: Any, device: str) -> nn.Parameter:
    if type(module).__name__ == "Linear4bit" and name == "weight":
        from bitsandbytes.nn import Params4bit

        values = torch.randn(module.out_features, module.in_features, device=device, dtype=torch.bfloat16).mul_(0.02)
        packed = Params4bit(
            values,
            requires_grad=False,
            quant_type=weight.quant_type,
            compress_statistics=weight.compress_statistics,
            module=module,
        ).to(device)
        module.quant_state = packed.quant_state
        return packed
    data = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    if weight.ndim >= 2:
        data.normal_(std=0.02)
    elif name == "bias":
        data.zero_()
    else:
        data.fill_(1.0)
    return nn.Parameter(data, requires_grad=weight.requires_grad)


def _rotary(module: nn.Module, device: str) -> None:
    """Buffers of a meta model have no values: a rotary embedding is created again from its config."""
    if not any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
        return
    config = getattr(module, "config", None)
    if config is None:
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
        return
    rebuilt = type(module)(config=config)
    for name, buffer in rebuilt._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.to(device)
