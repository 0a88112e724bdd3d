"""How long a run takes: operations a token by formula, and what a card does in a second.

Operations of a checkpointed step with adapters, per computed token: F = 6N + 8N_lora + 9 S d L + 4 rho V h (N weights
of the blocks' linear layers, N_lora those of adapters, S mean length of a row, d width of all heads, L layers, rho
labelled share, V vocabulary, h hidden width). Causal attention counts half of its square: 2 S d forward, as much to
recompute it, 5 backward. Without checkpointing one forward pass less; in full mode weights have a gradient as well, 2N
more and 2 rho V h for the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.schema import Config, TrainSection, TuningSection
from sft.memory import devices
from sft.memory.devices import CONTEXT, Device
from sft.memory.shapes import Shapes, known_models, of_known

# Dense 16-bit operations a second with sums in fp32, in 10^12, as the makers publish them; laptop cards at full power.
PEAK = {
    "RTX 2060": 25.8, "RTX 2070": 29.9, "RTX 2080": 40.3, "RTX 2080 Ti": 53.8, "T4": 65, "V100": 112, "P100": 18.7,
    "RTX 3050": 18.2, "RTX 3060": 25.5, "RTX 3060 Ti": 32.4, "RTX 3070": 40.6, "RTX 3070 Ti": 43.5, "RTX 3080": 59.5,
    "RTX 3080 Ti": 68.2, "RTX 3090": 71.2, "RTX 3090 Ti": 80, "RTX 4060": 30.2, "RTX 4060 Ti": 44.1, "RTX 4070": 58.3,
    "RTX 4070 Super": 71, "RTX 4070 Ti": 80.2, "RTX 4070 Ti Super": 88.2, "RTX 4080": 97.5, "RTX 4080 Super": 104.4,
    "RTX 4090": 165.2, "RTX 5050": 26.3, "RTX 5060": 38.4, "RTX 5060 Ti": 47.4, "RTX 5070": 61.7, "RTX 5070 Ti": 87.9,
    "RTX 5080": 112.6, "RTX 5090": 209.5, "RTX 4060 Laptop": 29.1, "RTX 4070 Laptop": 31.2, "RTX 4080 Laptop": 49.5,
    "RTX 4090 Laptop": 66, "RTX A2000": 31.9, "RTX A4000": 76.7, "RTX A5000": 111, "RTX A6000": 154.8, "L4": 121,
    "L40S": 362, "A10": 125, "A10G": 70, "A100": 312, "H100": 989, "H200": 989,
}  # fmt: skip
PRESUMED_SHARE = 0.4  # of the peak; published runs reach 0.19 (a 4060) to 0.68 (a tuned 4090)


def operations(
    shapes: Shapes, tuning: TuningSection, train: TrainSection, *, length: float, labelled: float = 1.0
) -> float:
    """Floating-point operations of a training step for each computed token. length: mean of the rows."""
    again = train.gradient_checkpointing is True
    full = tuning.mode == "full"
    linear = (2 + 2 * again + (4 if full else 2)) * shapes.active
    adapters = 0 if full else (6 + 2 * again) * tuning.lora.r * shapes.adapted
    attention = (7 + 2 * again) * length * shapes.attention * shapes.layers
    head = (6 if full else 4) * labelled * shapes.vocabulary * shapes.hidden
    return linear + adapters + attention + head


def rate(device: Device, measured: float | None, of: str = "") -> tuple[float, str] | None:
    """Operations a second to count on, and where that comes from; None where nothing is known of the device.

    measured: of earlier runs on it, `of` says which.
    """
    if measured:
        return measured, f"measured here: {of}"
    peak = {devices.plain(name): peak for name, peak in PEAK.items()}.get(devices.plain(device.name))
    if peak is None:
        return None
    return peak * 1e12 * PRESUMED_SHARE, f"{PRESUMED_SHARE:.0%} of {peak:g} TFLOP/s, presumed"


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
