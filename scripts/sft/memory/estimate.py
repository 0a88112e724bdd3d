"""What a training step needs, by a closed form: rough, but in no time; for lists of models. `plan` itself traces.

Weights, adapters, optimizer and checkpoints are counted; activations of one layer are fitted to the traced peaks of
Qwen2.5 0.5B-32B at 512 and 2048 tokens; tests/memory holds how close it comes. Other families have
other activations: within 15 % there, as far as we know. Say "rough" wherever it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.schema import Config, TrainSection, TuningSection
from sft.memory.devices import CONTEXT
from sft.memory.shapes import Shapes, known_models, of_known

GIB = float(2**30)
NF4, DOUBLE_QUANT = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / 64 / 256  # bytes a weight: codes, and constants of blocks of 64
FEED_FORWARD, STREAM = 10.6, 44.3  # bytes a token of one layer's activations, per widest and per hidden feature
HEAD_STREAM = 13.0  # bytes a token around the head, per hidden feature
TILE_LOGIT, FULL_LOGIT = 6.0, 14.0  # bytes a logit: one tile of ours, and all of them through autograd
FRAGMENTATION = 0.06  # share of the allocated bytes that the allocator cannot hand out again
MARGIN = 0.1  # share of a card left free when a model is proposed for it: the desktop, a browser
FIRST_CHOICE = "Qwen/Qwen2.5-3B-Instruct"


@dataclass(frozen=True)
class Estimate:
    """Sizes in GiB. parts: the items at the peak moment of a step; allocated their sum; peak with context and slack."""

    parts: dict[str, float]
    allocated: float
    peak: float


def step(
    shapes: Shapes,
    tuning: TuningSection,
    train: TrainSection,
    *,
    tokens: int,
    device: str = "cuda",
    labelled: float = 1.0,
) -> Estimate:
    """Peak memory of an optimizer step whose largest micro-batch has `tokens` tokens, padding included.

    `auto` in train.gradient_checkpointing is on for a GPU and off for a CPU. labelled: share of positions with a loss.
    """
    checkpointing = device == "cuda" if train.gradient_checkpointing == "auto" else bool(train.gradient_checkpointing)
    sizes = _standing(shapes, tuning)
    gradients = sizes.pop("gradients")
    one_layer = tokens * (FEED_FORWARD * shapes.widest + STREAM * shapes.hidden)
    if tuning.mode != "full" and tuning.lora.dropout > 0:
        one_layer += tokens * 5.0 * shapes.inputs / max(1, shapes.layers)  # dropped inputs in fp32 and their masks
    dequantised = 2.0 * shapes.largest if tuning.mode == "qlora" else 0.0
    kept = tokens * shapes.hidden * 2.0 * shapes.layers if checkpointing else one_layer * shapes.layers
    moments = {
        "head": {
            "checkpoints" if checkpointing else "activations": kept,
            "logits": _logits(shapes, train, tokens * labelled) + HEAD_STREAM * shapes.hidden * tokens,
        },
        "last layer": {
            "checkpoints" if checkpointing else "activations": kept,
            "layer": one_layer if checkpointing else 0.0,
            "dequantised": dequantised,
        },
        "first layer": {
            "gradients": gradients,
            "layer": one_layer,
            "dequantised": dequantised,
        },
    }
    worst = max(moments.values(), key=lambda items: sum(items.values()))
    sizes |= {name: size for name, size in worst.items() if size}
    sizes.setdefault("gradients", 0.0)
    parts = {name: size / GIB for name, size in sizes.items()}
    allocated = sum(parts.values())
    return Estimate(parts, allocated, with_slack(allocated, device))


def with_slack(allocated: float, device: str) -> float:
    """GiB of the card for `allocated` GiB of tensors: fragmentation and context, both assumed, not measured here."""
    return allocated * (1 + FRAGMENTATION) + CONTEXT[device]


def _standing(shapes: Shapes, tuning: TuningSection) -> dict[str, float]:
    """Bytes that are there all the time, and the gradients that grow in the backward pass."""
    trained = tuning.lora.r * shapes.adapted
    if tuning.mode == "full":
        weights = {"weights": 4.0 * shapes.total, "weights in 16 bit": 2.0 * shapes.linear}
        return {**weights, "optimizer": 8.0 * shapes.total, "gradients": 4.0 * shapes.total}
    if tuning.mode == "qlora":
        a_weight = DOUBLE_QUANT if tuning.double_quant else NF4
        weights = {"weights in 4 bit": a_weight * shapes.linear, "embedding and head": 2.0 * shapes.other}
    else:
        weights = {"weights": 2.0 * shapes.total}
    return {**weights, "adapters": 4.0 * trained, "optimizer": 8.0 * trained, "gradients": 4.0 * trained}


def _logits(shapes: Shapes, train: TrainSection, positions: float) -> float:
    if train.logits == "full":
        return FULL_LOGIT * positions * shapes.vocabulary
    return TILE_LOGIT * min(positions, train.logits_tile) * shapes.vocabulary


def that_fit(gib: float, *, length: int = 512) -> list[str]:
    """Known models that QLoRA trains on a card of `gib` GiB at rows of `length` tokens: the one to start with first.

    That is Qwen2.5-3B or, where it does not fit, the largest that does; then the smaller ones, then the larger.
    """
    defaults = Config()
    names = list(known_models())
    fits = [
        name
        for name in names
        if step(of_known(name, defaults.tuning), defaults.tuning, defaults.train, tokens=length).peak
        <= gib * (1 - MARGIN)
    ]
    up_to = names.index(FIRST_CHOICE) + 1
    return [name for name in reversed(names[:up_to]) if name in fits] + [name for name in names[up_to:] if name in fits]


def largest_that_fits(gib: float, *, length: int = 512) -> str | None:
    """The largest known model that QLoRA trains on a card of `gib` GiB; None where none does."""
    fits = set(that_fit(gib, length=length))
    return next((name for name in reversed(known_models()) if name in fits), None)


def changed(section: Any, **values: Any) -> Any:
    """A frozen section of the config with other values."""
    return section.model_copy(update=values)
