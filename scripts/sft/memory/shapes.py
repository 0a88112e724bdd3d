"""A model without its weights: the shipped list of config.json files, the model built on the meta device, its sizes.

Nothing is downloaded and nothing is computed. `trace.py` gives the tensors fake storage and follows a training step.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sft.config.schema import TuningSection
from sft.errors import ModelError
from sft.model import adapters
from sft.model.load import empty_4bit_weight, four_bit_config, keep_4bit_layout, quiet_libraries

_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_DECODERS: dict[str, tuple[Any, ...]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", 960, 2560, 32, 15, 5, 64, 49152, True),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "google/gemma-3-1b-it": ("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, True),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "google/gemma-2-2b-it": ("gemma2", 2304, 9216, 26, 8, 4, 256, 256000, True),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "microsoft/Phi-3.5-mini-instruct": ("phi3", 3072, 8192, 32, 32, 32, 96, 32064, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
    "allenai/OLMo-2-1124-7B-Instruct": ("olmo2", 4096, 11008, 32, 32, 32, 128, 100352, False),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "google/gemma-2-9b-it": ("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, True),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
}
_T5_KEYS = ("d_model", "d_ff", "num_layers", "num_heads")
_T5 = {"google/flan-t5-base": (768, 2048, 12, 12), "google/flan-t5-large": (1024, 2816, 24, 16)}


def shipped_models() -> dict[str, dict[str, Any]]:
    """Hub names and config.json of the models that are planned without a download, in no order of size."""
    models = {name: dict(zip(_KEYS, values, strict=True)) for name, values in _DECODERS.items()}
    models["microsoft/Phi-3.5-mini-instruct"]["pad_token_id"] = 32000
    for name, sizes in _T5.items():
        models[name] = {
            **dict(zip(_T5_KEYS, sizes, strict=True)),
            "model_type": "t5",
            "is_encoder_decoder": True,
            "d_kv": 64,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        }
    return models


def meta_model(
    description: Mapping[str, Any],
    name: str,
    tuning: TuningSection,
    dtype: torch.dtype,
    *,
    attention: str,
    checkpointing: bool,
    on_base: Callable[[Any], object] | None = None,
    sharded: bool = False,
) -> Any:
    """The model as training has it, on the meta device: `dtype` weights, 4-bit layers by transformers' rule, adapters.

    description: its config.json. attention: the attention function's name; a family without it gets transformers' eager
    one. on_base: called with the bare model, from which it may remove layers. sharded: 4-bit weights are stored so that
    ranks can share them. Raises ModelError for a config.json that transformers cannot build.
    """
    quiet_libraries()
    with torch.device("meta"):
        model = base_on_meta(description, name, dtype, attention)
        if on_base is not None:
            on_base(model)
        if tuning.mode == "qlora":
            from transformers.quantizers import AutoHfQuantizer

            quantizer = AutoHfQuantizer.from_config(
                four_bit_config(tuning, dtype, sharded=sharded), pre_quantized=False
            )
            quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
            keep_4bit_layout(model)
            model.is_loaded_in_4bit = True
        model.train()
        model.config.use_cache = False
        if tuning.mode == "full":
            adapters.freeze(model, tuning.freeze)
            adapters.set_checkpointing(model, checkpointing)
            return model
        return adapters.attach(model, tuning, gradient_checkpointing=checkpointing)


def base_on_meta(description: Mapping[str, Any], name: str, dtype: torch.dtype, attention: str) -> Any:
    """The bare model on the meta device. Raises ModelError if transformers cannot build it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    keys = {key: value for key, value in description.items() if key not in ("quantization_config", "dtype")}
    with model_errors(name), torch.device("meta"):
        config: Any = AutoConfig.for_model(**keys)
        seq2seq = getattr(config, "is_encoder_decoder", False)
        if seq2seq and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0  # any token will do
        maker = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        try:
            return maker.from_config(config, dtype=dtype, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            if "attention" not in str(error):
                raise
            return maker.from_config(config, dtype=dtype, attn_implementation="eager")


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Turns whatever transformers raises about a config.json into a ModelError."""
    try:
        yield
    except Exception as error:
        reason = re.split(r" (?:Should contain|Model type should be) one of", " ".join(str(error).split()))[0]
        raise ModelError(
            f"cannot build {name} from its config.json: {reason[:200]}",
            where="config.json",
            fix="plan reads models that transformers itself implements, without code of their own",
        ) from None


def add_storage(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every tensor of a meta model its storage on the active FakeTensorMode's CPU; tied tensors stay tied."""
    copies: dict[int, Any] = {}
    codes: dict[str, Tensor] = {}
    for key, ids in getattr(model, "prompt_tokens", {}).items():  # peft's, of a prefix
        model.prompt_tokens[key] = torch.empty(ids.shape, dtype=ids.dtype)  # type: ignore[union-attr, index, operator]
    for module in model.modules():
        four_bit = type(module).__name__ == "Linear4bit"
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in copies:
                copies[id(weight)] = (
                    empty_4bit_weight(weight, dtype, codes)
                    if four_bit and hasattr(weight, "quant_type")
                    else nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
                )
            module._parameters[name] = copy = copies[id(weight)]
            if is_four_bit(copy):
                module.quant_state = copy.quant_state  # type: ignore[attr-defined, assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                copy = copies.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))
                module._buffers[name] = copy


def is_four_bit(weight: Any) -> bool:
    """Whether this parameter, or the weight of this layer, holds packed 4-bit numbers."""
    return getattr(weight, "quant_state", None) is not None


def scales(layer: Any) -> list[Tensor]:
    """The tensors beside a packed weight: the scales of its blocks and, with double quantisation, their scales."""
    state = layer.quant_state
    inner = [state.state2.absmax, state.state2.code] if state.nested else []
    return [tensor for tensor in (state.absmax, state.code, state.offset, *inner) if tensor is not None]
