"""Adapters (LoRA, prefixes): the layers they go on, attaching, saving, loading, and the refusal of another base.

A layer is linear by its class, and the head by what the model says; names decide nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.errors import ModelError, nearest, one_line
from sft.model.files import tensors
from sft.model.tokenizer import NEW_TOKENS

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from sft.config.schema import LoraSection, TuningSection

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


def _linear_layers(model: nn.Module) -> list[str]:
    """The names of every linear layer but the head."""
    top = head(model)
    return [name for name, module in model.named_modules() if name and is_linear(module) and module is not top]


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the head, as peft takes them: last parts of names (`q_proj`), whole names where a last
    part alone would also hit the head or something that is not linear. Raises ModelError if there is none.
    """
    linear = _linear_layers(model)
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear layers to attach adapters to", fix="--set tuning.mode=full"
        )
    others = {_last(name) for name, _ in model.named_modules() if name and name not in set(linear)}
    return sorted({name if _last(name) in others else _last(name) for name in linear})


def targets(model: nn.Module, lora: LoraSection) -> list[str] | str:
    """`tuning.lora.target_modules` as peft takes it, every linear layer for `auto`. Raises ModelError naming what the
    model does not have: modules, or layers to transform.
    """
    names = [name for name, _ in model.named_modules()]
    layers = {int(number) for name in names for number in re.findall(r"^(?:.*?\.)?[^.]*\.(\d+)\.", name)}
    if unknown_layers := sorted(set(lora.layers_to_transform or []) - layers):
        what = f"tuning.lora.layers_to_transform names layers that the model does not have: {unknown_layers}"
        fix = f"its layers are 0 to {max(layers, default=0)}"
        raise ModelError(what, where="tuning.lora.layers_to_transform", fix=fix)
    if lora.all_linear:
        return [name for name in linear_names(model) if _last(name) not in lora.modules_to_save]
    if isinstance(lora.target_modules, str):
        if not any(re.fullmatch(lora.target_modules, name) for name in names):
            raise ModelError(
                f"tuning.lora.target_modules is {lora.target_modules!r}, which matches no layer of the model",
                where="tuning.lora.target_modules",
                fix=f"an expression matches whole names ({next(iter(_linear_layers(model)), '')}); names go in a list,"
                f" e.g. [{', '.join(linear_names(model))}]",
            )
        return lora.target_modules
    unknown = [target for target in lora.target_modules if not any(hits(target, name) for name in names)]
    if unknown:
        near = nearest(unknown[0], sorted({_last(name) for name in names}), 0.4)
        what = f"tuning.lora.target_modules names layers that the model does not have: {', '.join(unknown)}"
        fix = f"did you mean {near}? " * bool(near) + f"it has {', '.join(linear_names(model))}, or use auto"
        raise ModelError(what, where="tuning.lora.target_modules", fix=fix)
    return list(lora.target_modules)


def _refuse_idle_patterns(lora: LoraSection, adapted: Sequence[str]) -> None:
    """Raises ModelError for a rank or alpha pattern that no adapted layer matches; peft would ignore it."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):  # as peft matches
                what = f"tuning.lora.{key} has {pattern!r}, which matches no layer with an adapter"
                fix = f"it is matched against the end of names such as {adapted[0]}"
                raise ModelError(what, where=f"tuning.lora.{key}", fix=fix)


def attach(model: PreTrainedModel, tuning: TuningSection, *, gradient_checkpointing: bool) -> PeftModel:
    """New adapters on a frozen base; what is trained is float32, the base keeps its types and its bytes.

    No layer of the base is cast up (peft's `prepare_model_for_kbit_training` would turn the 16-bit embedding and head
    into float32). Non-reentrant checkpointing needs no gradient at the input. Draws from torch's global generator.
    Raises ModelError.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists

    new_tokens = getattr(model.config, NEW_TOKENS, None)
    if new_tokens and (tuning.adapter == "prefix" or model.config.is_encoder_decoder):
        raise ModelError(
            "model.add_tokens needs mode full here: a prefix, or adapters of an encoder-decoder, leave their rows as"
            " they are",
            where="model.add_tokens",
            fix="--set tuning.mode=full",
        )
    if tuning.adapter == "prefix":
        return _attach_prefix(model, tuning.prefix_tokens)
    lora = tuning.lora
    begin_at = Path(tuning.adapter_path) if tuning.adapter_path and model.device.type != "meta" else None
    record = _check_base(model, begin_at) if begin_at else {}
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False) and lora.modules_to_save)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora),
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save or None,
        ensure_weight_tying=tied,
        trainable_token_indices=_token_rows(model, new_tokens) if new_tokens else None,
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        revision=(getattr(model, "sft_base", None) or {}).get("revision"),
    )
    layers = {name: layer for name, layer in model.named_modules() if check_target_module_exists(config, name)}
    _refuse_idle_patterns(lora, list(layers))
    # GPT-2's Conv1D, alone without in_features, stores its weight as (in, out)
    config.fan_in_fan_out = any(is_linear(layer) and not hasattr(layer, "in_features") for layer in layers.values())
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
    if lora.from_weights:
        _begin_with_weights(adapted, lora.init)
    if begin_at is not None:
        _go_on_from(adapted, begin_at, record["config"])
    return adapted


def _token_rows(model: PreTrainedModel, ids: list[int]) -> dict[str, list[int]]:
    """The rows of new tokens that are trained, by the name of embedding and head; a tied head goes by the embedding."""
    embedding, top = model.get_input_embeddings(), head(model)
    tied = top is None or getattr(top, "weight", None) is embedding.weight
    modules = [embedding] if tied else [embedding, top]
    return {name: list(ids) for name, module in model.named_modules() if any(module is each for each in modules)}


def _attach_prefix(model: PreTrainedModel, tokens: int) -> PeftModel:
    """Trained keys and values of `tokens` positions in front of every row, in each layer (Li & Liang, 2021)."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    if model.config.is_encoder_decoder:
        what = "prefix tuning is for decoder-only models"
        raise ModelError(what, where="tuning.adapter", fix="--set tuning.adapter=lora")
    set_checkpointing(model, False)
    revision = (getattr(model, "sft_base", None) or {}).get("revision")
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens, revision=revision)
    adapted: Any = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted  # type: ignore[no-any-return]


def has_prefix(model: Any) -> bool:
    """Whether the adapter of this model is a prefix: rows are padded then, and peft's own `generate` is used."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _go_on_from(model: PeftModel, folder: Path, saved: Mapping[str, Any]) -> None:
    """Loads the adapter of `folder`, with the config `saved`, into a new one. Raises ModelError for another shape."""
    new = model.peft_config["default"].to_dict()
    same = {"r": "r", "alpha": "lora_alpha", "target_modules": "target_modules", "bias": "bias"}
    same |= {key: key for key in "use_rslora use_dora rank_pattern alpha_pattern layers_to_transform".split()}
    same["modules_to_save"] = "modules_to_save"
    other = {key: saved.get(name) for key, name in same.items() if _plain(saved.get(name)) != _plain(new[name])}
    if saved.get("peft_type") != "LORA" or other:
        raise ModelError(
            f"the adapter to go on from has another shape: {', '.join(other) or saved.get('peft_type')}",
            where=f"tuning.adapter_path: {folder}",
            fix=" ".join(f"--set 'tuning.lora.{key}={json.dumps(_plain(value))}'" for key, value in other.items())
            or "name a LoRA adapter",
        )
    if wrong := [name for names in restore(model, folder) for name in names]:
        raise ModelError(f"the adapter in {folder} does not fit: {wrong[0]}", where="tuning.adapter_path")


def _plain(value: Any) -> Any:
    """A value of an adapter's config in one form: no order in lists, nothing for what is empty."""
    return sorted(value) if isinstance(value, list | set | tuple) else value or None


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Switches the adapter off within the block, and nothing else: peft would also set its `requires_grad` to False,
    from which FSDP reads at a model's first forward pass in which type gradients are summed.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with model.disable_adapter():
        for weight in trained:
            weight.requires_grad_(True)
        yield


def freeze(model: nn.Module, expressions: Sequence[str]) -> None:
    """Trains no weight whose name contains a match. Raises ModelError for an expression without one, and if all are."""
    named = dict(model.named_parameters())
    for expression in expressions:
        matched = [name for name in named if re.search(expression, name)]
        if not matched:
            what = f"tuning.freeze has {expression!r}, which matches no weight of the model"
            fix = f"names are such as {', '.join(list(named)[:3])}; a tied head goes by its embedding"
            raise ModelError(what, where="tuning.freeze", fix=fix)
        for name in matched:
            named[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in named.values()):
        raise ModelError("tuning.freeze leaves no weight to train", where="tuning.freeze")


def lora_plus(groups: list[dict[str, Any]], model: nn.Module, rate: float, ratio: float) -> list[dict[str, Any]]:
    """The optimizer's parameter groups with the B matrices in groups of their own, of `ratio` times the rate (LoRA+,
    Hayou et al., 2024).
    """
    of_b = {id(weight) for name, weight in model.named_parameters() if ".lora_B." in name}

    def part(group: dict[str, Any], is_b: bool) -> list[Any]:
        return [weight for weight in group["params"] if (id(weight) in of_b) == is_b]

    faster = [{**group, "params": part(group, True), "lr": rate * ratio} for group in groups if part(group, True)]
    return [{**group, "params": part(group, False)} for group in groups] + faster


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every layer with LoRA matrices."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _begin_with_weights(model: nn.Module, init: str) -> None:
    """Sets A [r, in] and B [out, r] of every layer so that scaling * B @ A is a part of its weight W [out, in], and
    from then on subtracts that part's output, so that the layer begins as its base and W is never changed.

    `pissa`: U sqrt(S) and sqrt(S) V of the r largest singular values of W (Meng et al., 2024), `pissa_niter_N` by
    randomised SVD with N iterations. `olora`: the first r columns of Q and rows of R (Büyükakyüz, 2024). Both papers
    subtract the part from W itself: the same function and gradients, but a rounded and changed base. A 4-bit base is
    dequantised for its decomposition. Raises ModelError for adapters on anything but linear layers.
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight

    for name, layer in lora_layers(model):
        base = layer.get_base_layer()
        if not is_linear(base):
            what = f"tuning.lora.init is {init}, which needs linear layers, and {name} is {type(base).__name__}"
            raise ModelError(what, where="tuning.lora.init", fix="--set tuning.lora.init=default")
        a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        if len(a) > min(widths(base)):
            what = f"tuning.lora.init is {init}: {name} has {min(widths(base))} singular values, fewer than r {len(a)}"
            fix = f"a smaller r, or --set tuning.lora.rank_pattern={{{_last(name)}: {min(widths(base))}}}"
            raise ModelError(what, where="tuning.lora.r", fix=fix)
        if a.device.type != "meta":
            weight = dequantize_module_weight(base).detach().float()
            weight = weight if hasattr(base, "in_features") else weight.T
            if init == "olora":
                left, right = torch.linalg.qr(weight)
            else:
                u, s, v = (
                    torch.svd_lowrank(weight, len(a), niter=int(init.rpartition("_")[2])) if "niter" in init
                    else torch.svd(weight)
                )  # fmt: skip
                root = (s / scaling).sqrt()
                left, right = u * root, (v * root).T
            a.data.copy_(right[: len(a)])
            b.data.copy_(left[:, : len(a)])
        layer.register_buffer("first_a", a.detach().clone(), persistent=False)
        layer.register_buffer("first_b", b.detach().clone(), persistent=False)
        layer.register_forward_hook(_subtract_first)


def _subtract_first(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """A LoRA layer's output [..., out] without what its first matrices add to it; see `_begin_with_weights`."""
    import torch
    from torch.nn.functional import linear

    fused = torch.is_grad_enabled() and getattr(layer.__dict__.get("forward"), "sft_kernels", "") == "fused"
    if layer.disable_adapters or layer.merged or fused:  # fused layers subtract it in the same product
        return output
    dtype = output.dtype
    with torch.autocast(output.device.type, enabled=False):
        low = linear(inputs[0].to(dtype), layer.first_a.to(dtype))
        return output - linear(low, (layer.first_b * layer.scaling["default"]).to(dtype))


def set_checkpointing(model: Any, on: bool) -> None:
    """Switches the recomputation of activations in the backward pass on or off."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()


def save(model: PeftModel, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and base.json (the base's name and fingerprint).

    An adapter that began with the base's weights is written as plain LoRA of twice the rank, the second half being what
    is subtracted; so it fits the unchanged base, in every program. state: the model's, by default.
    """
    import torch

    state, begun = (
        dict(model.state_dict() if state is None else state),
        [(n, layer) for n, layer in lora_layers(model) if hasattr(layer, "first_a")],
    )
    for name, layer in begun:
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        state[a], state[b] = torch.cat([state[a], layer.first_a]), torch.cat([state[b], -layer.first_b], dim=1)
    # "auto" would ask the hub for the base's config; modules_to_save are written in any case
    model.save_pretrained(str(folder), safe_serialization=True, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    if begun:
        config = files.read_json(folder / CONFIG)
        factor = 2**0.5 if config["use_rslora"] else 2  # of alpha, so that its scale stays
        files.write_json(
            folder / CONFIG,
            {
                **config,
                "r": 2 * config["r"],
                "lora_alpha": factor * config["lora_alpha"],
                "rank_pattern": {key: 2 * rank for key, rank in config["rank_pattern"].items()},
                "alpha_pattern": {key: factor * alpha for key, alpha in config["alpha_pattern"].items()},
            },
        )
    if base := getattr(model.get_base_model(), "sft_base", None):
        files.write_json(folder / BASE, base)


def restore(model: PeftModel, folder: Path) -> tuple[list[str], list[str]]:
    """Loads what `save` wrote into the same adapter, bit for bit; returns the names that are missing and unexpected."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / WEIGHTS)
    if has_prefix(model):
        weight, saved = model.prompt_encoder["default"].embedding.weight, state.pop("prompt_embeddings", None)
        if saved is None or saved.shape != weight.shape:
            return ["prompt_embeddings"], list(state)
        weight.data.copy_(saved)
        return [], list(state)
    for name, layer in lora_layers(model):
        a, b, rank = f"{name}.lora_A.weight", f"{name}.lora_B.weight", layer.r["default"]
        if hasattr(layer, "first_a") and {a, b} <= state.keys():
            layer.first_a.copy_(state[a][rank:])
            layer.first_b.copy_(-state[b][:, rank:])
            state[a], state[b] = state[a][:rank], state[b][:, :rank]
    result = set_peft_model_state_dict(model, state)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [name for name in result.missing_keys if name in trained], list(result.unexpected_keys)


def load(
    model: PreTrainedModel | PeftModel, folder: Path, *, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """The adapter of `folder` on its base, or beside the adapters that the base has, of which `name` is then one.

    Raises ModelError if `model` is another base, naming both.
    """
    from peft import PeftModel

    _check_base(unwrap(model), folder)
    settings: dict[str, Any] = {"is_trainable": trainable, "use_safetensors": True, "local_files_only": True}
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), name, **settings)
        return model.eval()
    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, **settings)
    return adapted if trainable else adapted.eval()


def shares_base(folder: Path) -> bool:
    """Whether the adapter leaves its base as it is and can lie on it beside others (peft allows no second bias)."""
    config = base_of(folder)["config"]
    own = ("modules_to_save", "trainable_token_indices")
    return config.get("peft_type") == "LORA" and config.get("bias") == "none" and not any(map(config.get, own))


def _check_base(model: Any, folder: Path) -> dict[str, Any]:
    """`base_of` the adapter in `folder`. Raises ModelError if `model` is another base, naming both."""
    base, loaded = base_of(folder), getattr(model, "sft_base", None) or {"name": model.name_or_path}
    names = str(base["name"]), str(loaded["name"])
    problem = _shape_problem(model, folder, base["config"])
    if problem is None and base["fingerprint"] and loaded.get("fingerprint"):
        problem = None if base["fingerprint"] == loaded["fingerprint"] else "the weights differ"
    elif problem is None and base["name"] and Path(names[0]).name != Path(names[1]).name:  # a project can be moved
        problem = "the names differ, and nothing shows that the weights are the same"
    if problem:
        raise other_base(folder, *names, problem)
    return base


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
        what = f"{folder} has no {WEIGHTS}" + (", only a pickled adapter, which can run code" if pickled else "")
        fix = "save it again as safetensors" if pickled else "train again, or use another checkpoint"
        raise ModelError(what, where=str(folder), fix=fix)
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


def _shape_problem(model: Any, folder: Path, config: Mapping[str, Any]) -> str | None:
    """The first way in which the adapter's shapes are not this model's, None if all fit."""
    adapted, layers = (
        set(),
        {
            name.removesuffix(".base_layer"): module  # inside of an adapter that it has already
            for name, module in model.named_modules()
            if is_linear(module) and ".lora_" not in name
        },
    )
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
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    names = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
    chosen = LoraConfig(**{key: config[key] for key in names if config.get(key)})
    for name in layers.keys() - adapted:
        if chosen.target_modules and check_target_module_exists(chosen, name):
            return f"it has no weights for the layer {name}"
    return None


def _last(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]
