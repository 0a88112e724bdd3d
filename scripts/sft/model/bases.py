"""Which base an adapter belongs to: recorded beside it, compared before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.errors import ModelError
from sft.model.files import tensors
from sft.model.layers import hits, is_linear, widths

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"


def base_of(folder: Path) -> dict[str, Any]:
    """What the adapter was trained on: {"name", "revision", "fingerprint"}, None where not recorded; and the peft
    config under "config". Raises ModelError where the folder holds no adapter, or only a pickled one.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"there is no adapter in {folder}", where=str(folder / CONFIG), mend="name a folder such as adapters/last"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"{folder} has no {WEIGHTS}" + (", only a pickled adapter, which can run code" if pickled else ""),
            where=str(folder),
            mend="save it again as safetensors" if pickled else "train again, or take another checkpoint",
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base = json.loads((folder / BASE).read_text(encoding="utf-8")) if (folder / BASE).is_file() else {}
        if not isinstance(config, dict) or not isinstance(base, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ModelError(f"the adapter's description is not JSON: {error}", where=str(folder)) from None
    name = base.get("name") or config.get("base_model_name_or_path")
    return {"name": name, "revision": base.get("revision"), "fingerprint": base.get("fingerprint"), "config": config}


def refuse_other_base(model: Any, folder: Path, base: dict[str, Any]) -> None:
    """Raises ModelError, naming both, where `base` (see `base_of`) is not the base that `model` was loaded from."""
    here = getattr(model, "sft_base", None) or {"name": model.name_or_path, "fingerprint": None}
    problem = _misfit(model, folder, base["config"].get("target_modules"))
    if problem is None and base["fingerprint"] and here["fingerprint"]:
        if base["fingerprint"] != here["fingerprint"]:
            problem = "the weights differ"
    elif problem is None and base["name"] and not _same_name(str(base["name"]), str(here["name"])):
        problem = "the names differ, and nothing proves that the weights are the same"
    if problem:
        raise other_base(folder, str(base["name"]), str(here["name"]), problem)


def other_base(folder: Path, trained_on: str, here: str, problem: str) -> ModelError:
    """The error for an adapter on a base that is not its own."""
    return ModelError(
        f"this adapter belongs to another base: it was trained on {trained_on}, the model here is {here} ({problem})",
        where=str(folder),
        mend=f"--set model.name={trained_on}, or name the adapter that was trained on {here}",
    )


def _misfit(model: Any, folder: Path, wanted: Any) -> str | None:
    """The first way in which the adapter's shapes are not this model's, None where all fit."""
    modules, seen = dict(model.named_modules()), set()
    for key, entry in tensors(folder / WEIGHTS).items():
        name, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
        if side not in ("A.weight", "B.weight"):
            continue
        layer = modules.get(name)
        if layer is None or not is_linear(layer):
            return f"it has no layer {name}"
        width = widths(layer)[0 if side == "A.weight" else 1]
        got = entry["shape"][1 if side == "A.weight" else 0]
        if got != width:
            return f"{name} is {width} wide here, {got} in the adapter"
        seen.add(name)
    if isinstance(wanted, list):
        for name, layer in modules.items():
            if name not in seen and is_linear(layer) and any(hits(target, name) for target in wanted):
                return f"it has nothing for the layer {name}"
    return None


def _same_name(one: str, other: str) -> bool:
    """Whether two names mean one model: equal, or folders with the same last part (a project can be moved)."""
    return one == other or Path(one).name == Path(other).name
