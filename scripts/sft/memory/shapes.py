"""A model as training would have it, from its config.json alone: built where tensors take no memory, 4-bit layers and
adapters included. Nothing is downloaded and nothing computed; `memory/` traces it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sft.config.schema import TuningSection
from sft.errors import ModelError
from sft.model import adapters
from sft.model.adapters import head, hits, is_linear, widths
from sft.model.load import _four_bit, _keep_weights_canonical, _quiet, empty_4bit_weight

if TYPE_CHECKING:
    from sft.config.schema import TuningSection


def draw(
    config: Mapping[str, Any],
    name: str,
    tuning: TuningSection,
    dtype: torch.dtype,
    *,
    attention: str,
    checkpointing: bool,
    shorten: Callable[[Any], object] | None = None,
) -> Any:
    """The model on the meta device: `dtype` weights, 4-bit layers where transformers would make them, adapters.

    attention: the attention function's name; one that the family has not gives way to transformers' own choice.
    shorten: given the bare model, may take layers out of it.
    Raises ModelError for a family that transformers has not.
    """
    _quiet()
    with torch.device("meta"):
        model = _skeleton(config, name, dtype, attention)
        if shorten is not None:
            shorten(model)
        if tuning.mode == "qlora":
            _quantise(model, tuning, dtype)
        model.train()
        model.config.use_cache = False
        if tuning.mode == "full":
            adapters.set_checkpointing(model, checkpointing)
            return model
        return adapters.attach(model, tuning, gradient_checkpointing=checkpointing)


def fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every tensor of a drawn model its storage, on the CPU of the FakeTensorMode that is on; ties stay ties."""
    made: dict[int, Any] = {}
    codes: dict[str, Tensor] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in made:
                packed = hasattr(weight, "quant_type") and type(module).__name__ == "Linear4bit"
                made[id(weight)] = empty_4bit_weight(weight, dtype, codes) if packed else _like(weight)
            module._parameters[name] = made[id(weight)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


def is_four_bit(weight: Any) -> bool:
    """Whether this parameter holds packed 4-bit numbers."""
    return getattr(weight, "quant_state", None) is not None


def constants(weight: Any) -> list[Tensor]:
    """What stands beside a packed weight: scales of its blocks, and theirs."""
    state = weight.quant_state
    tensors = [state.absmax, state.code, state.offset]
    return [t for t in [*tensors, *((state.state2.absmax, state.state2.code) if state.nested else ())] if t is not None]


def _skeleton(config: Mapping[str, Any], name: str, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    with reading(name):
        made = _config(config)
        maker = AutoModelForSeq2SeqLM if getattr(made, "is_encoder_decoder", False) else AutoModelForCausalLM
        try:
            return maker.from_config(made, dtype=dtype, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            if "attention" not in str(error):
                raise
            return maker.from_config(_config(config), dtype=dtype, attn_implementation="eager")


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever transformers says of a config.json that it cannot use, as a ModelError."""
    try:
        yield
    except Exception as error:
        said = re.split(r" (?:Should contain|Model type should be) one of", " ".join(str(error).split()))[0]
        raise ModelError(
            f"cannot build {name} from its config.json: {said[:200]}",
            where="config.json",
            fix="plan reads models that transformers itself knows, with no code of their own",
        ) from None


def _config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    made = AutoConfig.for_model(**{k: v for k, v in config.items() if k not in ("quantization_config", "dtype")})
    if getattr(made, "is_encoder_decoder", False) and getattr(made, "decoder_start_token_id", None) is None:
        made.decoder_start_token_id = 0  # where its targets start: any token does
    return made


def _quantise(model: Any, tuning: TuningSection, dtype: torch.dtype) -> None:
    """Replaces the layers that transformers would load in 4 bit, by transformers' own rule."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(_four_bit(tuning, dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
    _keep_weights_canonical(model)
    model.is_loaded_in_4bit = True


def _like(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)


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
            fix="plan reads models that transformers itself knows",
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
