"""Small models of many families as config.json, resolved configs, and published traced peaks."""

from __future__ import annotations

from typing import Any

from sft.config.auto import Facts, resolve
from sft.config.schema import Config

_BASE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 64}
_OWN = {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": _GROUPED,
    "qwen3": _WIDE,
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "gemma2": {**_WIDE, "initializer_range": 2.0},  # so that the cap on its logits shows
    "gemma3_text": _WIDE,
    "phi3": _GROUPED,
    "falcon": {**_OWN, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt2": {**_OWN, "n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 1024},
    "gpt_neox": _BASE,
    "bloom": {**_OWN, "hidden_size": 256, "n_layer": 3, "n_head": 4},
    "granite": _GROUPED,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "opt": {**_BASE, "ffn_dim": 512, "word_embed_proj_dim": 256},
    "cohere": _GROUPED,
    "stablelm": _GROUPED,
    "qwen2_moe": {
        **_GROUPED,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    },
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "t5": {
        **_OWN,
        "d_model": 256,
        "d_ff": 512,
        "d_kv": 64,
        "num_layers": 3,
        "num_heads": 4,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
    },
}


def description(family: str) -> dict[str, Any]:
    """The config.json of a small model of this family."""
    return {"model_type": family, **FAMILIES[family]}


# GiB of others' fake-tensor trace of Qwen2.5's training step: NF4 with double quantisation, 16-bit embedding and head,
# r 16 on all linear layers, fp32 adapters and AdamW, checkpointing, one row, all labelled, no dropout.
CELLS = ((512, "chunked"), (2048, "chunked"), (512, "full"), (2048, "full"))  # tokens, train.logits
PEAKS = {
    "0.5B": (0.98, 1.06, 1.56, 4.68),
    "1.5B": (1.75, 1.90, 2.33, 5.51),
    "3B": (2.76, 3.01, 3.34, 6.61),
    "7B": (6.16, 6.82, 6.74, 10.1),
    "14B": (10.7, 11.8, 11.3, 15.1),
    "32B": (20.4, 21.9, 20.7, 24.8),
}


def changed(section: Any, **values: Any) -> Any:
    """A frozen section of the config with other values."""
    return section.model_copy(update=values)


def resolved(mode: str, device: str, *, dropout: float = 0.05, length: int = 512, **train: Any) -> Config:
    """The default config with this mode, as training on `device` would resolve it."""
    config = Config()
    lora = changed(config.tuning.lora, dropout=dropout)
    tuning, section = changed(config.tuning, mode=mode, lora=lora), changed(config.train, **train)
    config = changed(config, tuning=tuning, train=section, model=changed(config.model, max_seq_len=length))
    capability = (8, 0) if device == "cuda" else None
    return resolve(config, Facts(device=device, capability=capability, measured_batch=1)).config  # type: ignore[arg-type]
