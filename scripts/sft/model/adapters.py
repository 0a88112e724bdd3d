"""LoRA adapters: the layers they go on, attaching, saving, loading, and the refusal of another base.

A layer is linear by its class, and the head by what the model says; names decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.errors import ModelError, nearest, one_line
from sft.model.files import tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from sft.config.schema import TuningSection

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"


def head(model: Any) -> Any:
    """The module that turns hidden states into logits, None if the model names none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP and peft wrappers."""
    from torch import nn

    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    base: Any = model
    return base.get_base_model() if hasattr(base, "get_base_model") else base  # type: ignore[no-any-return]


def is_linear(module: Any) -> bool:
    """Whether this is a linear layer: nn.Linear, bitsandbytes' kinds (subclasses of it), or GPT-2's Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def widths(layer: Any) -> tuple[int, int]:
    """(input, output) features of a linear layer, also of a 4-bit one and of Conv1D."""
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (layer.nx, layer.nf)


def hits(target: str, name: str) -> bool:
    """Whether peft's target `target` means the layer called `name`."""
    return name == target or name.endswith("." + target)


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the head, as peft takes them: last parts of names (`q_proj`), whole names where a last
    part alone would also hit the head or something that is not linear. Raises ModelError if there is none.
    """
    top = head(model)
    modules = [(name, module) for name, module in model.named_modules() if name]
    linear = [name for name, module in modules if is_linear(module) and module is not top]
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear layers to attach adapters to", fix="--set tuning.mode=full"
        )
    others = {_last(name) for name, _ in modules if name not in set(linear)}
    return sorted({name if _last(name) in others else _last(name) for name in linear})


def targets(model: nn.Module, tuning: TuningSection) -> list[str]:
    """`tuning.lora.target_modules`, or every linear layer for `auto`. Raises ModelError naming unknown entries."""
    lora = tuning.lora
    if lora.target_modules == "auto":
        return [name for name in linear_names(model) if _last(name) not in lora.modules_to_save]
    names = [name for name, _ in model.named_modules()]
    unknown = [target for target in lora.target_modules if not any(hits(target, name) for name in names)]
    if unknown:
        near = nearest(unknown[0], sorted({_last(name) for name in names}), 0.4)
        raise ModelError(
            f"tuning.lora.target_modules names layers that the model does not have: {', '.join(unknown)}",
            where="tuning.lora.target_modules",
            fix=f"did you mean {near}? " * bool(near) + f"it has {', '.join(linear_names(model))}, or use auto",
        )
    return list(lora.target_modules)


def attach(model: PreTrainedModel, tuning: TuningSection, *, gradient_checkpointing: bool) -> PeftModel:
    """New adapters on a frozen base; what is trained is float32, the base keeps its types and its bytes.

    No layer of the base is cast up (peft's `prepare_model_for_kbit_training` would turn the 16-bit embedding and head
    into float32). Non-reentrant checkpointing needs no gradient at the input. Draws from torch's global generator.
    Raises ModelError.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    lora, names = tuning.lora, targets(model, tuning)
    adapted_layers = [layer for name, layer in model.named_modules() if any(hits(target, name) for target in names)]
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False) and lora.modules_to_save)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save or None,
        ensure_weight_tying=tied,
        # GPT-2's Conv1D, alone without in_features, stores its weight as (in, out)
        fan_in_fan_out=any(is_linear(module) and not hasattr(module, "in_features") for module in adapted_layers),
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        revision=(getattr(model, "sft_base", None) or {}).get("revision"),
    )
    set_checkpointing(model, gradient_checkpointing)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        where, fix = "tuning.lora", None
        if "dropout" in str(error) and lora.dropout > 0:  # peft's adapters on a bare tensor, as of experts
            where = "tuning.lora.dropout"
            fix = "adapters on this model's fused experts support no dropout: --set tuning.lora.dropout=0"
        raise ModelError(f"no adapter can be attached: {one_line(error)}", where=where, fix=fix) from None
    for weight in adapted.parameters():
        if weight.requires_grad and weight.is_floating_point():
            weight.data = weight.data.float()
    return adapted


def set_checkpointing(model: Any, on: bool) -> None:
    """Switches the recomputation of activations in the backward pass on or off."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()


def save(model: PeftModel, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and base.json (the base's name and fingerprint)."""
    # "auto" would ask the hub for the base's config; modules_to_save are written in any case
    model.save_pretrained(str(folder), safe_serialization=True, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    if base := getattr(model.get_base_model(), "sft_base", None):
        files.write_json(folder / BASE, base)


def load(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The adapter of `folder` on its base. Raises ModelError if `model` is another base, naming both."""
    from peft import PeftModel

    base, loaded = base_of(folder), getattr(model, "sft_base", None) or {"name": model.name_or_path}
    names = str(base["name"]), str(loaded["name"])
    problem = _shape_problem(model, folder, base["config"].get("target_modules"))
    if problem is None and base["fingerprint"] and loaded.get("fingerprint"):
        problem = None if base["fingerprint"] == loaded["fingerprint"] else "the weights differ"
    elif problem is None and base["name"] and Path(names[0]).name != Path(names[1]).name:  # a project can be moved
        problem = "the names differ, and nothing shows that the weights are the same"
    if problem:
        raise other_base(folder, *names, problem)
    adapted = PeftModel.from_pretrained(
        model, str(folder), is_trainable=trainable, use_safetensors=True, local_files_only=True
    )
    return adapted if trainable else adapted.eval()


def base_of(folder: Path) -> dict[str, Any]:
    """What the adapter was trained on: {"name", "revision", "fingerprint"}, None if not recorded; and the peft
    config under "config". Raises ModelError if the folder holds no adapter, or only a pickled one.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"there is no adapter in {folder}", where=str(folder / CONFIG), fix="name a folder such as adapters/last"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"{folder} has no {WEIGHTS}" + (", only a pickled adapter, which can run code" if pickled else ""),
            where=str(folder),
            fix="save it again as safetensors" if pickled else "train again, or use another checkpoint",
        )
    config, base = files.read_json(folder / CONFIG), files.read_json(folder / BASE)
    if not config:
        raise ModelError("the adapter's description is not JSON", where=str(folder / CONFIG))
    name = base.get("name") or config.get("base_model_name_or_path")
    return {"name": name, "revision": base.get("revision"), "fingerprint": base.get("fingerprint"), "config": config}


def other_base(folder: Path, trained_on: str, loaded: str, problem: str) -> ModelError:
    """The error for an adapter on a base that is not its own."""
    return ModelError(
        f"this adapter belongs to another base: it was trained on {trained_on}, the model here is {loaded} ({problem})",
        where=str(folder),
        fix=f"--set model.name={trained_on}, or name the adapter that was trained on {loaded}",
    )


def _shape_problem(model: Any, folder: Path, target_modules: Any) -> str | None:
    """The first way in which the adapter's shapes are not this model's, None if all fit."""
    layers, adapted = {name: module for name, module in model.named_modules() if is_linear(module)}, set()
    for key, entry in tensors(folder / WEIGHTS).items():
        name, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
        if side not in ("A.weight", "B.weight"):
            continue
        if name not in layers:
            return f"it has no layer {name}"
        index = ("A.weight", "B.weight").index(side)
        width, saved = widths(layers[name])[index], entry["shape"][1 - index]
        if saved != width:
            return f"{name} is {width} wide here, {saved} in the adapter"
        adapted.add(name)
    if isinstance(target_modules, list):
        for name in layers.keys() - adapted:
            if any(hits(target, name) for target in target_modules):
                return f"it has no weights for the layer {name}"
    return None


def _last(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]
