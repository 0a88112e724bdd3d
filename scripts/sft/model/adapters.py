"""Adapters: which layers get one, attaching them to a frozen base, saving, and loading onto the right base alone."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError
from sft.model.bases import BASE, CONFIG, WEIGHTS, base_of, refuse_other_base
from sft.model.layers import head, hits, is_conv1d, is_linear, last

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from sft.config.schema import TuningSection

__all__ = ["BASE", "CONFIG", "WEIGHTS", "attach", "base_of", "count", "linear_names", "load", "save", "targets"]


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the head, as peft takes them: last parts of names (`q_proj`), whole names where a last
    part alone would also hit the head or something that is not linear. Found by class (nn.Linear, bitsandbytes' linear
    layers, GPT-2's Conv1D), the head by what the model says it is.
    """
    top = head(model)
    linear = [name for name, module in model.named_modules() if name and is_linear(module) and module is not top]
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear layers to attach adapters to", mend="--set tuning.mode=full"
        )
    wanted = set(linear)
    others = {last(name) for name, _ in model.named_modules() if name not in wanted}
    return sorted({name if last(name) in others else last(name) for name in linear})


def targets(model: nn.Module, tuning: TuningSection) -> list[str]:
    """`tuning.lora.target_modules`, or what `auto` finds. Raises ModelError naming every entry that hits nothing."""
    lora = tuning.lora
    if lora.target_modules == "auto":
        return [name for name in linear_names(model) if last(name) not in lora.modules_to_save]
    names = [name for name, _ in model.named_modules()]
    unknown = [given for given in lora.target_modules if not any(hits(given, name) for name in names)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted({last(name) for name in names}), 1, 0.4)
        raise ModelError(
            f"tuning.lora.target_modules names layers the model has not: {', '.join(unknown)}",
            where="tuning.lora.target_modules",
            mend=f"did you mean {near[0]}? " * bool(near) + f"it has {', '.join(linear_names(model))}, or use auto",
        )
    return list(lora.target_modules)


def attach(model: PreTrainedModel, tuning: TuningSection, *, gradient_checkpointing: bool) -> PeftModel:
    """New adapters on a frozen base; what is trained is float32, the base keeps its types and its bytes.

    No layer of the base is cast up (peft's `prepare_model_for_kbit_training` would turn the 16-bit embedding and head
    into float32). Non-reentrant checkpointing needs no gradient at the input. Draws from torch's global generator.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    lora, named = tuning.lora, targets(model, tuning)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False) and lora.modules_to_save)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=named,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save or None,
        ensure_weight_tying=tied,
        fan_in_fan_out=any(is_conv1d(m) and any(hits(n, name) for n in named) for name, m in model.named_modules()),
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        revision=(getattr(model, "sft_base", None) or {}).get("revision"),
    )
    set_checkpointing(model, gradient_checkpointing)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        dropout = "dropout" in str(error) and lora.dropout > 0  # peft's adapters on a bare tensor, as of experts
        raise ModelError(
            f"no adapter can be attached: {' '.join(str(error).split())[:300]}",
            where="tuning.lora.dropout" if dropout else "tuning.lora",
            mend="this model's experts are tensors, whose adapters take no dropout: --set tuning.lora.dropout=0"
            if dropout
            else None,
        ) from None
    for weight in adapted.parameters():
        if weight.requires_grad and weight.is_floating_point():
            weight.data = weight.data.float()
    return adapted


def set_checkpointing(model: Any, on: bool) -> None:
    """Switches the recomputing of activations in the backward pass on or off."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit tensor counts the numbers it stands for."""
    trainable = every = 0
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        size = state.shape.numel() if state is not None else weight.numel()
        every += size
        trainable += size if weight.requires_grad else 0
    return trainable, every


def save(model: PeftModel, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and base.json (the base's name and fingerprint)."""
    # "auto" would ask the hub for the base's config; modules_to_save are written in any case
    model.save_pretrained(str(folder), safe_serialization=True, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    if base := getattr(model.get_base_model(), "sft_base", None):
        (folder / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def load(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The adapter of `folder` on its base. Raises ModelError where this is another base, naming both."""
    from peft import PeftModel

    base = base_of(folder)
    refuse_other_base(model, folder, base)
    adapted = PeftModel.from_pretrained(
        model, str(folder), is_trainable=trainable, use_safetensors=True, local_files_only=True
    )
    return adapted if trainable else adapted.eval()
