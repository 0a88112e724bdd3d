"""How fast several cards can be: the arithmetic of a step, the bytes that it sends, and both as tokens a second.

Nothing here is measured. Arithmetic is counted at EFFICIENCY of the card's published peak, bytes at the link's
published speed. Where they overlap fully, the longer one bounds the step; without any overlap, their sum does.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.memory.devices import Device

EFFICIENCY = 0.4  # of the peak, presumed: Llama 3 405B reached 38-43 % (Dubey et al., 2024, arXiv 2407.21783, table 4)
# 10^12 operations a second in dense bf16 with fp32 sums: NVIDIA's data sheets and architecture white papers
TERAFLOPS = {
    "RTX 3090": 71.0, "RTX 4090": 165.2, "RTX 5090": 209.5, "RTX A6000": 154.8, "A10": 125.0, "A30": 165.0,
    "A40": 149.7, "L40S": 362.0, "A100": 312.0, "H100": 989.4, "H200": 989.4,
}  # fmt: skip
# 10^9 bytes a second that one card sends: NVLink of the SXM boards (half of the total that is published for both
# directions), PCIe 4.0 x16 elsewhere; over one machine of 8 cards 400 Gb/s InfiniBand for each card.
NVLINK = {"V100": 150.0, "A100": 300.0, "H100": 450.0, "H200": 450.0}
PCIE, INFINIBAND, OF_A_MACHINE = 31.5, 50.0, 8


@dataclass(frozen=True)
class Speed:
    """A step of `tokens` tokens over all ranks. sent: bytes that a rank sends. link: GB/s, with its name.

    arithmetic, sending: seconds; None where the card's speed or the link's is unknown.
    """

    tokens: int
    sent: int
    link: tuple[float, str] | None
    arithmetic: float | None
    sending: float | None

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Without any overlap of arithmetic and sending, and with full overlap."""
        if self.arithmetic is None or self.sending is None:
            return None
        return self.tokens / (self.arithmetic + self.sending), self.tokens / max(self.arithmetic, self.sending)

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_a_step": self.tokens,
            "sent_bytes": self.sent,
            "link_gb_per_s": None if self.link is None else self.link[0],
            "sending_seconds": self.sending,
            "arithmetic_seconds": self.arithmetic,
            "tokens_per_second": self.tokens_per_second,
        }


def bound(device: Device, tokens: int, sent: int, operations: float | None, link: float | None) -> Speed:
    """tokens: of a step. sent, operations: of a rank's step. link: GB/s, None for what is published of the device."""
    named = None if link is None else (link, "as given")
    if named is None and device.kind == "cuda":
        if device.count > OF_A_MACHINE:
            named = INFINIBAND, "400 Gb/s InfiniBand for each card"
        else:
            named = (NVLINK[device.name], "NVLink") if device.name in NVLINK else (PCIE, "PCIe 4.0 x16")
    peak = TERAFLOPS.get(device.name)
    known = operations is not None and peak is not None
    arithmetic = operations / (peak * 1e12 * EFFICIENCY) if known else None  # type: ignore[operator]
    return Speed(tokens, sent, named, arithmetic, None if named is None else sent / (named[0] * 1e9))


def ring_all_reduce(size: int, ranks: int) -> int:
    """Bytes that each rank sends until all have the sum of `size` bytes: a reduce-scatter and an all-gather."""
    return 2 * size * (ranks - 1) // ranks


def operations_per_token(
    multiplied: int, adapters: int, trained: int, attention: int, length: int, repeated: int
) -> float:
    """Floating-point operations of a training step for each token of rows of `length` tokens.

    multiplied: weights of the base's matrix products, each 2 operations in the forward pass, 2 for the gradient of its
    input and, where it is `trained`, 2 for its own (Kaplan et al., 2020, arXiv 2001.08361). attention: layers times
    the width of all heads; scores and their product with the values, of half the positions because of the causal mask.
    repeated: weights whose forward pass is done again, by gradient checkpointing.
    """
    matrices = 4.0 * (multiplied + adapters) + 2.0 * trained + 2.0 * (repeated + (adapters if repeated else 0))
    return matrices + (4 if repeated else 3) * 2.0 * attention * length
