"""From bytes of tensors to memory of a device: fragmentation and context, measured where they were, else presumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sft.memory import calibration
from sft.memory.devices import CONTEXT, Device
from sft.memory.estimate import FRAGMENTATION

# What was measured by card: (share that the allocator holds beyond the tensors, GiB of the context). None is yet.
BY_CARD: dict[str, tuple[float, float]] = {}


@dataclass(frozen=True)
class Slack:
    """share: of the allocated bytes, held beyond them. context_gib: before the first tensor. drift: measured over
    traced bytes, of earlier runs. source: where these come from, in words. flops: operations a second achieved
    here by earlier runs, None where none was measured; flops_of: of which, in words.
    """

    share: float
    context_gib: float
    drift: float
    source: str
    flops: float | None = None
    flops_of: str = ""

    def peak(self, allocated_gib: float) -> float:
        """GiB of the device that `allocated_gib` of tensors take."""
        return allocated_gib * self.drift * (1 + self.share) + self.context_gib


def of(device: Device, family: str, root: Path | None, *, model: str = "") -> Slack:
    """What holds for this device and family: this machine's own records, then the table of cards, then presumption."""
    share, context = BY_CARD.get(device.name, (FRAGMENTATION, CONTEXT[device.kind]))
    source = "measured on this card" if device.name in BY_CARD else "presumed: not measured on such a card"
    name = "cpu" if device.kind == "cpu" else device.name
    found = calibration.lookup(root, name, family, model) if root is not None else None
    if found is None:
        return Slack(share, context, 1.0, source)
    learnt = [name for name in ("drift", "slack", "context_gib") if getattr(found, name) is not None]
    if learnt:
        whose = f"{family} models" if found.family else "other models"
        source = f"measured in {found.records} runs of {whose} here ({', '.join(learnt)})"
    return Slack(
        share=share if found.slack is None else found.slack,
        context_gib=context if found.context_gib is None else found.context_gib,
        drift=1.0 if found.drift is None else found.drift,
        source=source,
        flops=found.flops,
        flops_of=found.flops_of,
    )
