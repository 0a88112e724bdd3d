"""GPUs by name or by memory, as users write them (`8GiB`, `RTX 4060`, `cpu`), and what this machine has."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from sft.errors import ConfigError, nearest

CARDS: dict[str, tuple[float, ...]] = {  # memory in GiB as sold, the most common version first
    "RTX 2060": (6, 12), "RTX 2060 Super": (8,), "RTX 2070": (8,), "RTX 2070 Super": (8,), "RTX 2080": (8,),
    "RTX 2080 Super": (8,), "RTX 2080 Ti": (11,), "RTX 3050": (8, 6), "RTX 3050 Laptop": (4, 6), "RTX 3060": (12, 8),
    "RTX 3060 Laptop": (6,), "RTX 3060 Ti": (8,), "RTX 3070": (8,), "RTX 3070 Laptop": (8,), "RTX 3070 Ti": (8,),
    "RTX 3070 Ti Laptop": (8,), "RTX 3080": (10, 12), "RTX 3080 Laptop": (8, 16), "RTX 3080 Ti": (12,),
    "RTX 3080 Ti Laptop": (16,), "RTX 3090": (24,), "RTX 3090 Ti": (24,), "RTX 4050 Laptop": (6,), "RTX 4060": (8,),
    "RTX 4060 Laptop": (8,), "RTX 4060 Ti": (8, 16), "RTX 4070": (12,), "RTX 4070 Laptop": (8,),
    "RTX 4070 Super": (12,), "RTX 4070 Ti": (12,), "RTX 4070 Ti Super": (16,), "RTX 4080": (16,),
    "RTX 4080 Laptop": (12,), "RTX 4080 Super": (16,), "RTX 4090": (24,), "RTX 4090 Laptop": (16,), "RTX 5050": (8,),
    "RTX 5060": (8,), "RTX 5060 Laptop": (8,), "RTX 5060 Ti": (8, 16), "RTX 5070": (12,), "RTX 5070 Laptop": (8,),
    "RTX 5070 Ti": (16,), "RTX 5070 Ti Laptop": (12,), "RTX 5080": (16,), "RTX 5080 Laptop": (16,), "RTX 5090": (32,),
    "RTX 5090 Laptop": (24,), "RTX A2000": (6, 12), "RTX A4000": (16,), "RTX A4500": (20,), "RTX A5000": (24,),
    "RTX A6000": (48,), "RTX 2000 Ada": (16,), "RTX 4000 Ada": (20,), "RTX 4500 Ada": (24,), "RTX 5000 Ada": (32,),
    "RTX 6000 Ada": (48,), "RTX Pro 6000": (96,), "Quadro RTX 6000": (24,), "Titan RTX": (24,), "T4": (16,),
    "V100": (16, 32), "P100": (16,), "P40": (24,), "L4": (24,), "L40": (48,), "L40S": (48,), "A10": (24,),
    "A10G": (24,), "A30": (24,), "A40": (48,), "A100": (40, 80), "H100": (80,), "H200": (141,), "GTX 1060": (6, 3),
    "GTX 1070": (8,), "GTX 1070 Ti": (8,), "GTX 1080": (8,), "GTX 1080 Ti": (11,), "GTX 1650": (4,),
    "GTX 1650 Super": (4,), "GTX 1660": (6,), "GTX 1660 Super": (6,), "GTX 1660 Ti": (6,),
}  # fmt: skip
_SIZE = re.compile(r"(?<![\d.e])(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb)\b", re.IGNORECASE)
_SEVERAL = re.compile(r"\s*(\d+)\s*[x\u00d7*]\s*(\S.*)", re.IGNORECASE)
MOST_RANKS = 16_384
_OTHER_MAKERS = re.compile(r"\b(amd|radeon|rocm|instinct|rx ?\d{3,4}|mi\d{2,3}x?|apple|m[1-5]|mps|metal|intel|arc)\b")


@dataclass(frozen=True)
class Device:
    """What to plan for. gib: its memory (GiB = 2^30 bytes; a card sold with 8 GB has 8 GiB). count: so many of them."""

    kind: Literal["cuda", "cpu"]
    name: str
    gib: float
    count: int = 1


def parse(text: str) -> Device:
    """The device that `--gpu text` names.

    `cpu` is this machine's memory. A card with several memory sizes counts with its first unless a size is given as
    well (`RTX 3080 12GB`); an unknown card needs a size. `2x24GiB`: two of them; `2xcpu`: two processes that share this
    machine's memory. Raises ConfigError with the nearest known name.
    """
    if several := _SEVERAL.match(text):
        count, device = int(several[1]), parse(several[2])
        if not 0 < count <= MOST_RANKS:
            raise ConfigError(
                f"{count} devices cannot be planned for: 1 to {MOST_RANKS:,} can be",
                where="--gpu",
                fix="write it like this: --gpu 2x24GiB, or --gpu 8GiB for one",
            )
        return replace(device, count=count, gib=device.gib / (count if device.kind == "cpu" else 1))
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
        return Device("cuda", card, gib or CARDS[card][0])
    if gib is not None:
        return Device("cuda", f"a card of {gib:g} GiB", gib)
    similar = next((card for card in known if name and card.startswith(name)), None) or nearest(name, known, 0.5)
    guess = f"{name}GiB" if re.fullmatch(r"[\d.]+", name) else known[similar] if similar else ""
    raise ConfigError(
        f"unknown card: {text}" if name else "--gpu names no card",
        where="--gpu",
        fix=(f'did you mean --gpu "{guess}"? ' if guess else "")
        + f"name a known card {size_hint}; leave it out to plan for this machine",
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
    sizes = sorted((size, rank, card) for rank, (card, sold) in enumerate(CARDS.items()) for size in sold)
    return next((f"{card} ({size:g} GiB)" for size, _, card in sizes if size >= gib), None)


def normalize_name(text: str) -> str:
    """A card's name in lower case, without maker, memory size or form factor: the driver's spelling equals a user's."""
    words = re.sub(r"nvidia|geforce|tesla|gpu", " ", _SIZE.sub(" ", text).lower()).replace("mobile", "laptop")
    words = re.sub(r"(?<=\d)(ti|super|laptop)", r" \1", re.sub(r"[-_]", " ", words))
    words = re.sub(r"\b(sxm\d?|pcie|nvl|hbm\d\w?|sff|blackwell)\b", " ", re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", words))
    return re.sub(r"^(?=a?\d{4}\b)", "rtx ", " ".join(words.split()))
