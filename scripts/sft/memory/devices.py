"""GPUs by name or by memory, as users write them (`8GiB`, `RTX 4060`, `cpu`), and what this machine has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from sft.errors import ConfigError, nearest

# Dense 16-bit TFLOP/s with fp32 accumulation as the makers publish them (laptop cards at full power; None if not
# looked up), then memory in GiB as sold, the most common version first.
CARDS: dict[str, tuple[Any, ...]] = {
    "RTX 2060": (25.8, 6, 12), "RTX 2060 Super": (None, 8), "RTX 2070": (29.9, 8), "RTX 2070 Super": (None, 8),
    "RTX 2080": (40.3, 8), "RTX 2080 Super": (None, 8), "RTX 2080 Ti": (53.8, 11), "RTX 3050": (18.2, 8, 6),
    "RTX 3050 Laptop": (None, 4, 6), "RTX 3060": (25.5, 12, 8), "RTX 3060 Laptop": (None, 6), "RTX 3060 Ti": (32.4, 8),
    "RTX 3070": (40.6, 8), "RTX 3070 Laptop": (None, 8), "RTX 3070 Ti": (43.5, 8), "RTX 3070 Ti Laptop": (None, 8),
    "RTX 3080": (59.5, 10, 12), "RTX 3080 Laptop": (None, 8, 16), "RTX 3080 Ti": (68.2, 12),
    "RTX 3080 Ti Laptop": (None, 16), "RTX 3090": (71.2, 24), "RTX 3090 Ti": (80, 24), "RTX 4050 Laptop": (None, 6),
    "RTX 4060": (30.2, 8), "RTX 4060 Laptop": (29.1, 8), "RTX 4060 Ti": (44.1, 8, 16), "RTX 4070": (58.3, 12),
    "RTX 4070 Laptop": (31.2, 8), "RTX 4070 Super": (71, 12), "RTX 4070 Ti": (80.2, 12),
    "RTX 4070 Ti Super": (88.2, 16), "RTX 4080": (97.5, 16), "RTX 4080 Laptop": (49.5, 12),
    "RTX 4080 Super": (104.4, 16), "RTX 4090": (165.2, 24), "RTX 4090 Laptop": (66, 16), "RTX 5050": (26.3, 8),
    "RTX 5060": (38.4, 8), "RTX 5060 Laptop": (None, 8), "RTX 5060 Ti": (47.4, 8, 16), "RTX 5070": (61.7, 12),
    "RTX 5070 Laptop": (None, 8), "RTX 5070 Ti": (87.9, 16), "RTX 5070 Ti Laptop": (None, 12), "RTX 5080": (112.6, 16),
    "RTX 5080 Laptop": (None, 16), "RTX 5090": (209.5, 32), "RTX 5090 Laptop": (None, 24), "RTX A2000": (31.9, 6, 12),
    "RTX A4000": (76.7, 16), "RTX A4500": (None, 20), "RTX A5000": (111, 24), "RTX A6000": (154.8, 48),
    "RTX 2000 Ada": (None, 16), "RTX 4000 Ada": (None, 20), "RTX 4500 Ada": (None, 24), "RTX 5000 Ada": (None, 32),
    "RTX 6000 Ada": (None, 48), "RTX Pro 6000": (None, 96), "Quadro RTX 6000": (None, 24), "Titan RTX": (None, 24),
    "T4": (65, 16), "V100": (112, 16, 32), "P100": (18.7, 16), "P40": (None, 24), "L4": (121, 24), "L40": (None, 48),
    "L40S": (362, 48), "A10": (125, 24), "A10G": (70, 24), "A30": (None, 24), "A40": (None, 48), "A100": (312, 40, 80),
    "H100": (989, 80), "H200": (989, 141), "GTX 1060": (None, 6, 3), "GTX 1070": (None, 8), "GTX 1070 Ti": (None, 8),
    "GTX 1080": (None, 8), "GTX 1080 Ti": (None, 11), "GTX 1650": (None, 4), "GTX 1650 Super": (None, 4),
    "GTX 1660": (None, 6), "GTX 1660 Super": (None, 6), "GTX 1660 Ti": (None, 6),
}  # fmt: skip
_SIZE = re.compile(r"(?<![\d.e])(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb)\b", re.IGNORECASE)
_OTHER_MAKERS = re.compile(r"\b(amd|radeon|rocm|instinct|rx ?\d{3,4}|mi\d{2,3}x?|apple|m[1-5]|mps|metal|intel|arc)\b")


@dataclass(frozen=True)
class Device:
    """What to plan for. gib: its memory (GiB = 2^30 bytes; a card sold with 8 GB has 8 GiB)."""

    kind: Literal["cuda", "cpu"]
    name: str
    gib: float

    @property
    def flops(self) -> float | None:
        """Published dense 16-bit operations per second; None for a card that is not in the table, and for a CPU."""
        tflops = {normalize_name(card): peak for card, (peak, *_) in CARDS.items()}.get(normalize_name(self.name))
        return None if tflops is None else tflops * 1e12


def parse(text: str) -> Device:
    """The device that `--gpu text` names.

    `cpu` is this machine's memory. A card with several memory sizes counts with its first unless a size is given as
    well (`RTX 3080 12GB`); an unknown card needs a size. Raises ConfigError with the nearest known name.
    """
    if text.strip().lower() == "cpu":
        return this_cpu()
    match = _SIZE.search(text)
    gib = None if match is None else float(match[1]) / (1024 if match[2].lower().startswith("m") else 1)
    name, size_hint = normalize_name(text), "or give its memory: --gpu 8GiB"
    if _OTHER_MAKERS.search(name):
        raise ConfigError(
            f"only NVIDIA GPUs and the CPU can be planned for, and {text.strip()} is neither",
            where="--gpu",
            fix="--gpu cpu plans for this machine's own memory; an NVIDIA card may be given by its memory: --gpu 8GiB",
        )
    if gib is not None and (gib == 0 or text.strip().startswith("-")):
        raise ConfigError(f"{text.strip()} is not a memory size", where="--gpu", fix="write it like this: --gpu 8GiB")
    known = {normalize_name(card): card for card in CARDS}
    if name in known:
        card = known[name]
        return Device("cuda", card, gib or CARDS[card][1])
    if gib is not None:
        return Device("cuda", f"a card of {gib:g} GiB", gib)
    similar = next((card for card in known if name and card.startswith(name)), None) or nearest(name, known, 0.5)
    guess = f"{name}GiB" if re.fullmatch(r"[\d.]+", name) else known[similar] if similar else ""
    raise ConfigError(
        f"unknown card: {text}" if name else "--gpu names no card",
        where="--gpu",
        fix=(f'did you mean --gpu "{guess}"? ' if guess else "")
        + f"name a known card {size_hint}; without --gpu the plan is for this machine",
    )


def this_cpu() -> Device:
    """This machine's memory, or the container's limit if there is one."""
    from sft.model.hardware import memory

    return Device("cpu", "the CPU of this machine", memory()[0] / 2**30)


def this_machine() -> Device:
    """The GPU of this machine as its driver reports it, else its CPU. Imports no torch."""
    from sft.model.hardware import gpus

    visible = gpus()
    return Device("cuda", visible[0].name, visible[0].total_bytes / 2**30) if visible else this_cpu()


def smallest_card(gib: float) -> str | None:
    """The smallest known card with at least this much memory, e.g. `RTX 3060 (12 GiB)`; None if there is none."""
    sizes = sorted((size, rank, card) for rank, (card, (_, *sold)) in enumerate(CARDS.items()) for size in sold)
    return next((f"{card} ({size:g} GiB)" for size, _, card in sizes if size >= gib), None)


def normalize_name(text: str) -> str:
    """A card's name in lower case, without maker, memory size or form factor: the driver's spelling equals a user's."""
    words = re.sub(r"nvidia|geforce|tesla|gpu", " ", _SIZE.sub(" ", text).lower()).replace("mobile", "laptop")
    words = re.sub(r"(?<=\d)(ti|super|laptop)", r" \1", re.sub(r"[-_]", " ", words))
    words = re.sub(r"\b(sxm\d?|pcie|nvl|hbm\d\w?|sff|blackwell)\b", " ", re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", words))
    return re.sub(r"^(?=a?\d{4}\b)", "rtx ", " ".join(words.split()))
