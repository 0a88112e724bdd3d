"""A model's parameters, counted exactly from its config alone: built on the meta device, where weights take no room."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sft.config.schema import TuningSection
from sft.errors import ModelError
from sft.model import adapters
from sft.model.layers import head, hits, is_linear, widths

_INSTRUCT = "Qwen/Qwen2.5-{}-Instruct"
# hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied: as in each model's config.json.
_QWEN = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}


@dataclass(frozen=True)
class Shapes:
    """What the closed form needs. Counts are of parameters; widths of features.

    linear: weights of the layers that 4-bit quantises. largest: the largest of these. other: all the rest, a tied head
    counted once. adapted: in + out widths, summed over the layers that take adapters; inputs: their in widths.
    active: linear weights that one token goes through, of experts those that are chosen. attention: width of all heads.
    """

    linear: int
    largest: int
    other: int
    adapted: int
    inputs: int
    hidden: int
    widest: int
    layers: int
    vocabulary: int
    active: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.other


def known_models() -> dict[str, dict[str, Any]]:
    """Hub names of the models that the quick start offers and their configs, smallest first: nothing is downloaded."""
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
    )
    return {
        _INSTRUCT.format(size): {"model_type": "qwen2", **dict(zip(keys, values, strict=True))}
        for size, values in _QWEN.items()
    }


@functools.lru_cache(maxsize=16)
def _of_known(name: str, tuning: str) -> Shapes:
    return count(known_models()[name], TuningSection.model_validate_json(tuning), name=name)


def of_known(name: str, tuning: TuningSection) -> Shapes:
    """Shapes of one of `known_models`."""
    return _of_known(name, tuning.model_dump_json())


def count(config: Mapping[str, Any], tuning: TuningSection, *, name: str = "the model") -> Shapes:
    """The shapes of the model that a config.json describes. Raises ModelError for a family transformers has not."""
    model = _on_meta(config, name)
    top = head(model)
    linear = {path: module for path, module in model.named_modules() if is_linear(module) and module is not top}
    sizes = {path: module.weight.numel() for path, module in linear.items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    if tuning.mode == "full":
        chosen: list[Any] = []
    else:
        wanted = adapters.targets(model, tuning)
        chosen = [module for path, module in linear.items() if any(hits(each, path) for each in wanted)]
    text = model.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0))  # 0: a state-space model
    return Shapes(
        linear=sum(sizes.values()),
        largest=max(sizes.values()),
        other=total - sum(sizes.values()),
        adapted=sum(sum(widths(module)) for module in chosen),
        inputs=sum(widths(module)[0] for module in chosen),
        hidden=int(text.hidden_size),
        widest=max(max(widths(module)) for module in linear.values()),
        layers=_layers(text),
        vocabulary=int(text.vocab_size),
        active=sum(sizes.values()) + int(_share_of_experts(text) * _stacked(model)),
        attention=heads * int(getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)),
    )


def _on_meta(config: Mapping[str, Any], name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        made = AutoConfig.for_model(**config)
        maker = AutoModelForSeq2SeqLM if getattr(made, "is_encoder_decoder", False) else AutoModelForCausalLM
        with torch.device("meta"):
            return maker.from_config(made)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"cannot build {name} from its config.json: {' '.join(str(error).split())[:200]}",
            where="config.json",
            mend="plan reads models that transformers itself knows",
        ) from None


def _stacked(model: Any) -> int:
    """Weights of experts that are kept as one tensor of three dimensions."""
    return sum(weight.numel() for weight in model.parameters() if weight.ndim == 3)


def experts(config: Any) -> int:
    """How many experts a layer has, by the config of the text model; 0 where it has none."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(count) for key in keys if (count := getattr(config, key, 0))), 0)


def _share_of_experts(config: Any) -> float:
    """The experts that a token goes through, of all."""
    every = experts(config)
    return float(getattr(config, "num_experts_per_tok", every) or every) / every if every else 1.0


def _layers(config: Any) -> int:
    encoder = int(getattr(config, "num_hidden_layers", 0))
    decoder = getattr(config, "num_decoder_layers", None)
    return encoder + int(decoder) if decoder and getattr(config, "is_encoder_decoder", False) else encoder
