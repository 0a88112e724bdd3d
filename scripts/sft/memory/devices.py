"""How much memory a card has, by its name, or by what the user says: `8GiB`, `RTX 4060`, `cpu`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from sft.errors import ConfigError

CONTEXT = {"cuda": 0.6, "cpu": 0.5}  # GiB that the driver (or Python with torch) takes before the first tensor
LIBRARIES = {"cuda": 2.0, "cpu": CONTEXT["cpu"]}  # GiB of RAM of Python with torch: presumed with CUDA's, else measured
# Memory of each card in GiB, as sold; more than one where there are several versions, the smallest first.
CARDS: dict[str, tuple[float, ...]] = {
    "RTX 2060": (6, 12),
    "RTX 2060 Super": (8,),
    "RTX 2070": (8,),
    "RTX 2070 Super": (8,),
    "RTX 2080": (8,),
    "RTX 2080 Super": (8,),
    "RTX 2080 Ti": (11,),
    "RTX 3050": (8, 6),
    "RTX 3050 Laptop": (4, 6),
    "RTX 3060": (12, 8),
    "RTX 3060 Laptop": (6,),
    "RTX 3060 Ti": (8,),
    "RTX 3070": (8,),
    "RTX 3070 Laptop": (8,),
    "RTX 3070 Ti": (8,),
    "RTX 3070 Ti Laptop": (8,),
    "RTX 3080": (10, 12),
    "RTX 3080 Laptop": (8, 16),
    "RTX 3080 Ti": (12,),
    "RTX 3080 Ti Laptop": (16,),
    "RTX 3090": (24,),
    "RTX 3090 Ti": (24,),
    "RTX 4050 Laptop": (6,),
    "RTX 4060": (8,),
    "RTX 4060 Laptop": (8,),
    "RTX 4060 Ti": (8, 16),
    "RTX 4070": (12,),
    "RTX 4070 Laptop": (8,),
    "RTX 4070 Super": (12,),
    "RTX 4070 Ti": (12,),
    "RTX 4070 Ti Super": (16,),
    "RTX 4080": (16,),
    "RTX 4080 Laptop": (12,),
    "RTX 4080 Super": (16,),
    "RTX 4090": (24,),
    "RTX 4090 Laptop": (16,),
    "RTX 5050": (8,),
    "RTX 5060": (8,),
    "RTX 5060 Laptop": (8,),
    "RTX 5060 Ti": (8, 16),
    "RTX 5070": (12,),
    "RTX 5070 Laptop": (8,),
    "RTX 5070 Ti": (16,),
    "RTX 5070 Ti Laptop": (12,),
    "RTX 5080": (16,),
    "RTX 5080 Laptop": (16,),
    "RTX 5090": (32,),
    "RTX 5090 Laptop": (24,),
    "RTX A2000": (6, 12),
    "RTX A4000": (16,),
    "RTX A4500": (20,),
    "RTX A5000": (24,),
    "RTX A6000": (48,),
    "RTX 2000 Ada": (16,),
    "RTX 4000 Ada": (20,),
    "RTX 4500 Ada": (24,),
    "RTX 5000 Ada": (32,),
    "RTX 6000 Ada": (48,),
    "RTX Pro 6000": (96,),
    "Quadro RTX 6000": (24,),
    "Titan RTX": (24,),
    "T4": (16,),
    "V100": (16, 32),
    "P100": (16,),
    "P40": (24,),
    "L4": (24,),
    "L40": (48,),
    "L40S": (48,),
    "A10": (24,),
    "A10G": (24,),
    "A30": (24,),
    "A40": (48,),
    "A100": (40, 80),
    "H100": (80,),
    "H200": (141,),
    "GTX 1060": (6, 3),
    "GTX 1070": (8,),
    "GTX 1070 Ti": (8,),
    "GTX 1080": (8,),
    "GTX 1080 Ti": (11,),
    "GTX 1650": (4,),
    "GTX 1650 Super": (4,),
    "GTX 1660": (6,),
    "GTX 1660 Super": (6,),
    "GTX 1660 Ti": (6,),
}
SIZE = re.compile(r"(?<![\d.e])(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb)\b", re.IGNORECASE)
OTHERS = re.compile(r"\b(amd|radeon|rocm|instinct|rx ?\d{3,4}|mi\d{2,3}x?|apple|m[1-5]|mps|metal|intel|arc)\b")


@dataclass(frozen=True)
class Device:
    """Where a step is to fit. gib: its memory (GiB = 2^30 bytes; a card sold with 8 GB has 8 GiB)."""

    kind: Literal["cuda", "cpu"]
    name: str
    gib: float


def parse(text: str) -> Device:
    """The device that `text` means. `cpu` is this machine's memory. A name with several sizes takes the first unless
    one is named (`RTX 3080 12GB`), and a name that is not known needs one. Raises ConfigError with the nearest name."""
    if text.strip().lower() == "cpu":
        return this_cpu()
    said = SIZE.search(text)
    gib = None if said is None else float(said[1]) / (1024 if said[2].lower().startswith("m") else 1)
    name, size = plain(text), "its memory does as well: --gpu 8GiB"
    if OTHERS.search(name):
        raise ConfigError(
            f"a plan is made for a card of NVIDIA or for the CPU, and {text.strip()} is neither",
            where="--gpu",
            fix=f"--gpu cpu plans for this machine's own memory; {size}",
        )
    if gib is not None and (gib == 0 or text.strip().startswith("-")):
        raise ConfigError(f"{text.strip()} is no card's memory", where="--gpu", fix="say it so: --gpu 8GiB")
    known = {plain(card): card for card in CARDS}
    if name in known:
        card = known[name]
        return Device("cuda", card, gib or CARDS[card][0])
    if gib is not None:
        return Device("cuda", f"a card of {gib:g} GiB", gib)
    near = [card for card in known if name and card.startswith(name)] or difflib.get_close_matches(name, known, 1, 0.5)
    guess = f"{name}GiB" if re.fullmatch(r"[\d.]+", name) else known[near[0]] if near else ""
    raise ConfigError(
        f"no card of this name is known: {text}" if name else "--gpu names no card",
        where="--gpu",
        fix=(f'did you mean --gpu "{guess}"? ' if guess else "") + f"{size}; without --gpu it is this machine",
    )


def this_cpu() -> Device:
    """This machine's memory (a container's limit respected)."""
    from sft.model.hardware import memory

    return Device("cpu", "the CPU of this machine", memory()[0] / 2**30)


def here() -> Device:
    """The GPU of this machine as its driver tells, else its CPU. Imports no torch."""
    from sft.model.hardware import gpus

    found = gpus()
    return Device("cuda", found[0].name, found[0].total_bytes / 2**30) if found else this_cpu()


def smallest_card(gib: float) -> str | None:
    """The smallest card of the table with at least this much memory, e.g. `RTX 3060 (12 GiB)`."""
    sizes = sorted((size, index, card) for index, (card, all_) in enumerate(CARDS.items()) for size in all_)
    for size, _, card in sizes:
        if size >= gib:
            return f"{card} ({size:g} GiB)"
    return None


def plain(text: str) -> str:
    """A card's name without its maker and in one spelling, so that a person's and the driver's are the same."""
    words = re.sub(r"nvidia|geforce|tesla|gpu", " ", SIZE.sub(" ", text).lower()).replace("mobile", "laptop")
    words = re.sub(r"(?<=\d)(ti|super|laptop)", r" \1", re.sub(r"[-_]", " ", words))
    words = re.sub(r"\b(sxm\d?|pcie|nvl|hbm\d\w?|sff|blackwell)\b", " ", re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", words))
    return re.sub(r"^(?=a?\d{4}\b)", "rtx ", " ".join(words.split()))


def ram(parameters: int, mode: str, device: str) -> float:
    """GiB of the machine's own memory that a run takes, roughly: the libraries and, on a CPU, what stands there in fp32
    all the time: weights, and in full mode gradients and two moments of each.
    """
    numbers = 0 if device == "cuda" else 4 if mode == "full" else 1
    return LIBRARIES[device] + 4 * numbers * parameters / 2**30
