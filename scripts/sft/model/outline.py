"""A model as training would have it, from its config.json alone: built where tensors take no memory, 4-bit layers and
adapters included. Nothing is downloaded and nothing computed; `memory/` traces it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sft.errors import ModelError
from sft.model import adapters
from sft.model.loading import _four_bit, _keep_weights_canonical, _quiet

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
                made[id(weight)] = _packed(weight, dtype, codes) if packed else _like(weight)
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
            mend="plan reads models that transformers itself knows, with no code of their own",
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


def _packed(weight: Any, dtype: torch.dtype, codes: dict[str, Tensor]) -> nn.Parameter:
    """Packed 4-bit storage with the state that bitsandbytes keeps: blocks of 64, their scales in blocks of 256."""
    from bitsandbytes.functional import QuantState

    blocks = -(-weight.numel() // 64)
    if "map" not in codes:
        codes["map"] = torch.empty(256)
    inner = QuantState(absmax=torch.empty(-(-blocks // 256)), code=codes["map"], blocksize=256, dtype=torch.float32)
    nested = weight.compress_statistics
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=torch.empty(()) if nested else None,
        state2=inner if nested else None,
    )
    packed: Any = nn.Parameter(torch.empty((-(-weight.numel() // 2), 1), dtype=torch.uint8), requires_grad=False)
    packed.quant_state, packed.quant_type, packed.compress_statistics = state, weight.quant_type, nested
    return packed  # type: ignore[no-any-return]
