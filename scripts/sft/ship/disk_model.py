"""A model whose weights stay on the disk: each layer reads its own when its turn comes, and lets them go.

So a model of any size is run once over a few tokens with the memory of one layer, whatever type its weights have; sums
are float32. Adapters are peft's own, and are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError
from sft.model import files as model_files
from sft.model.files import ModelFiles
from sft.ship.changes import BLOCK, home

if TYPE_CHECKING:
    import torch


class Weights:
    """The tensors in a model's files, by the names that the model's parameters have. Each read opens the file anew."""

    def __init__(self, files: ModelFiles, model: Any) -> None:
        self.shapes: dict[str, list[int]] = {}
        where: dict[str, Path] = {}
        for path in files.weights:
            for name, entry in model_files.tensors(path).items():
                where[name], self.shapes[name] = path, entry["shape"]
        self.where: dict[str, tuple[Path, str]] = {}
        shared: dict[int, list[str]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(weight), []).append(name)
        for names in shared.values():
            found = next((hit for name in names if (hit := home(name, set(where)))), None)
            if found is None:
                raise ModelError(f"{files.name} has no tensor for {names[0]}", where=str(files.path))
            self.where.update(dict.fromkeys(names, (where[found], found)))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some of its rows, in float32."""
        from safetensors import safe_open

        path, key = self.where[name]
        with safe_open(path, "pt") as opened:
            found: torch.Tensor = opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
            return found.float() if found.is_floating_point() else found.clone()


def open_model(files: ModelFiles, config: dict[str, Any], *, trust_remote_code: bool, adapter: Path | None) -> Any:
    """The model in eval mode, with peft's adapter on it where one is named.

    config: what differs from the model's config.json (a vocabulary that the adapter has made larger). Raises ModelError
    where the files do not hold a parameter under its name.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    settings = AutoConfig.from_pretrained(files.path, local_files_only=True, trust_remote_code=trust_remote_code)
    settings.update(config)
    maker = AutoModelForSeq2SeqLM if files.kind == "seq2seq" else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model: Any = maker.from_config(settings, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    model.config.use_cache = False
    weights = Weights(files, model)
    named = {module: name for name, module in model.named_modules()}
    hollow = _hollow(model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            model, str(adapter), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=True
        )
    _attend(model, named, weights, hollow)
    return model.eval()


def _hollow(model: Any) -> dict[int, Any]:
    """Turns weights of the meta device into ones of the CPU that have a shape and no memory; returns them by their id.

    peft puts an adapter where its base layer is, and nothing can be computed on the meta device.
    """
    import torch
    from torch import nn

    made: dict[int, Any] = {}
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                empty = nn.Parameter(torch.zeros(1).expand(weight.shape), requires_grad=False)
                module._parameters[key] = made.setdefault(id(weight), empty)
    return {id(weight): weight for weight in made.values()}


def _attend(model: Any, named: dict[Any, str], weights: Weights, hollow: dict[int, Any]) -> None:
    """Gives every module that has weights on the disk the means to read them for the time of its forward."""
    from torch import nn

    units: dict[Any, list[tuple[Any, str, str]]] = {}
    for module in model.modules():
        own = {key: weight for key, weight in module._parameters.items() if id(weight) in hollow}
        if not own or module not in named:
            continue
        places = [(module, key, f"{named[module]}.{key}".lstrip(".")) for key in own]
        unit = next((outer for outer in model.modules() if _needs_base(outer, module)), module)
        units.setdefault(unit, []).extend(places)
    for unit, places in units.items():
        plain = type(unit) is nn.Linear
        unit.__dict__["forward"] = (_linear if plain else _loaded)(unit, places, weights)


def _needs_base(outer: Any, module: Any) -> bool:
    """Whether `outer` is an adapter that looks at the weights of its base layer `module` (DoRA)."""
    return bool(getattr(outer, "lora_magnitude_vector", None)) and getattr(outer, "base_layer", None) is module


def _loaded(unit: Any, places: list[tuple[Any, str, str]], weights: Weights) -> Any:
    forward = unit.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _held(places, weights):
            return forward(*args, **kwargs)

    return run


@contextmanager
def _held(places: list[tuple[Any, str, str]], weights: Weights) -> Iterator[None]:
    from torch import nn

    kept = [(module, key, module._parameters[key]) for module, key, _ in places]
    try:
        for module, key, name in places:
            module._parameters[key] = nn.Parameter(weights.read(name), requires_grad=False)
        yield
    finally:
        for module, key, empty in kept:
            module._parameters[key] = empty


def _linear(layer: Any, places: list[tuple[Any, str, str]], weights: Weights) -> Any:
    """A linear layer's forward, some rows of its weight at a time: a head may be as large as ten layers."""
    import torch

    names = {key: name for _, key, name in places}

    def run(x: torch.Tensor) -> torch.Tensor:
        step = max(1, BLOCK // layer.in_features)
        parts = [
            torch.nn.functional.linear(x, weights.read(names["weight"], slice(at, at + step)))
            for at in range(0, layer.out_features, step)
        ]
        found = torch.cat(parts, dim=-1)
        bias = weights.read(names["bias"]) if "bias" in names else layer.bias  # a trained one came with the adapter
        return found if bias is None else found + bias

    return run
