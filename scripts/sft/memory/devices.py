"""How much memory a card has, by its name, or by what the user says: `8GiB`, `RTX 4060`, `cpu`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from sft.errors import ConfigError

# Memory of each card in GiB, as sold; more than one where there are several versions, the smallest first.
CARDS: dict[str, tuple[float, ...]] = {
    "GTX 1080 Ti": (11,),
    "GTX 1660": (6,),
    "RTX 2060": (6, 12),
    "RTX 2070": (8,),
    "RTX 2080": (8,),
    "RTX 2080 Ti": (11,),
    "RTX 3050": (8, 6),
    "RTX 3050 Laptop": (4, 6),
    "RTX 3060": (12, 8),
    "RTX 3060 Laptop": (6,),
    "RTX 3060 Ti": (8,),
    "RTX 3070": (8,),
    "RTX 3070 Laptop": (8,),
    "RTX 3070 Ti": (8,),
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
    "RTX A5000": (24,),
    "RTX A6000": (48,),
    "T4": (16,),
    "V100": (16, 32),
    "P100": (16,),
    "L4": (24,),
    "L40S": (48,),
    "A10": (24,),
    "A10G": (24,),
    "A100": (40, 80),
    "H100": (80,),
    "H200": (141,),
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb)", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """Where a step is to fit. gib: its memory (GiB = 2^30 bytes; a card sold with 8 GB has 8 GiB)."""

    kind: Literal["cuda", "cpu"]
    name: str
    gib: float


def parse(text: str) -> Device:
    """The device that `text` means. `cpu` is this machine's memory. A name with several sizes takes the first unless
    one is named (`RTX 3080 12GB`). Raises ConfigError with the nearest name."""
    if text.strip().lower() == "cpu":
        return this_cpu()
    said = SIZE.search(text)
    gib = None if said is None else float(said[1]) / (1024 if said[2].lower().startswith("m") else 1)
    name = plain(SIZE.sub(" ", text))
    if not name and gib:
        return Device("cuda", f"a card of {gib:g} GiB", gib)
    known = {plain(card): card for card in CARDS}
    if name in known:
        card = known[name]
        return Device("cuda", card, gib or CARDS[card][0])
    near = difflib.get_close_matches(name, known, 1, 0.5)
    raise ConfigError(
        f"no card of this name is known: {text}",
        where="--gpu",
        mend=(f'did you mean --gpu "{known[near[0]]}"? ' if near else "") + "its memory does as well: --gpu 8GiB",
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
    words = re.sub(r"nvidia|geforce|tesla|gpu", " ", text.lower()).replace("mobile", "laptop")
    words = re.sub(r"(?<=\d)(ti|super|laptop)", r" \1", words.replace("-", " "))
    words = re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", words)
    return " ".join(re.sub(r"^(?=\d{4}\b)", "rtx ", " ".join(words.split())).split())
