"""How a model's config and tensors stand in a GGUF file, for the architectures that are tried against llama.cpp.

Names come from the gguf package's TensorNameMap. Source of what is special to each: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
}
ROPE_FACTORS = "rope_freqs.weight"


def architecture(config: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the model's architecture. Raises ModelError for one that is not covered."""
    found = next(iter(config.get("architectures") or ["unknown"]))
    if found not in ARCHITECTURES:
        raise ModelError(
            f"{name} is a {found}, which export to GGUF does not cover: it covers {', '.join(ARCHITECTURES)}",
            where="config.json: architectures",
            mend="FORMAT=hf, then llama.cpp's own convert_hf_to_gguf.py",
        )
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if ARCHITECTURES[found] == "qwen3" and biased:
        raise ModelError(f"{name} has biases that llama.cpp's {found} has no place for", mend="FORMAT=hf")
    return ARCHITECTURES[found]


def tensor_names(arch: str, layers: int, names: list[str]) -> dict[str, str]:
    """The GGUF name of each of the model's tensors. Raises ModelError for one that has none."""
    import gguf

    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    mapping = gguf.get_tensor_name_map(kind, layers)
    found = {}
    for name in names:
        if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")):
            continue  # computed, not trained
        place = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ModelError(f"GGUF has no place for {name} in {arch}", mend="FORMAT=hf")
        found[name] = place
    return found


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], arch: str) -> None:
    """Writes the model's dimensions. Raises ModelError for position scalings that are not covered."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    context, window = config["max_position_embeddings"], config.get("sliding_window")
    sliding = config.get("use_sliding_window", arch == "llama") and window
    writer.add_context_length(min(context, window) if sliding else context)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if arch == "llama":
        writer.add_rope_dimension_count(width)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    _scaling(writer, rope)


def rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """What Llama 3.1 divides each frequency by (Dubey et al. 2024), [head width / 2]; None for other models."""
    import numpy as np

    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    trained = rope["original_max_position_embeddings"]
    found = []
    for index in range(0, width, 2):
        length = 2 * math.pi * rope.get("rope_theta", 10000.0) ** (index / width)
        smooth = min(1.0, max(0.0, (trained / length - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def arranged(name: str, values: NDArray[Any], config: dict[str, Any], arch: str) -> NDArray[Any]:
    """The tensor as llama.cpp wants it: Llama's queries and keys have the two halves of each head interleaved."""
    if arch != "llama" or not re.search(r"\.self_attn\.[qk]_proj\.", name):
        return values
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    turned = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2)
    return turned.reshape(values.shape)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Position settings under their new names, whichever way config.json tells them."""
    told = dict(config.get("rope_scaling") or {})
    told.update(config.get("rope_parameters") or {})
    told.setdefault("rope_type", told.get("type", "default"))
    if "rope_theta" in config:
        told.setdefault("rope_theta", config["rope_theta"])
    return told


def _scaling(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    import gguf

    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "linear", "llama3"):
        raise ModelError(f"positions scaled the {kind} way are not covered by export to GGUF", mend="FORMAT=hf")
