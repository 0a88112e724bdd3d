"""How long a run takes: operations a token by formula, and what a card does in a second.

Operations of a checkpointed step with adapters, per computed token: F = 6N + 8N_lora + 9 S d L + 4 rho V h (N weights
of the blocks' linear layers, N_lora those of adapters, S mean length of a row, d width of all heads, L layers, rho
labelled share, V vocabulary, h hidden width). Causal attention counts half of its square: 2 S d forward, as much to
recompute it, 5 backward. Without checkpointing one forward pass less; in full mode weights have a gradient as well, 2N
more and 2 rho V h for the head.
"""

from __future__ import annotations

from sft.config.schema import TrainSection, TuningSection
from sft.memory import devices
from sft.memory.devices import Device
from sft.memory.shapes import Shapes

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
