"""Cards by name and by size, as users write them."""

from __future__ import annotations

import pytest

from sft.errors import ConfigError
from sft.memory import devices


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("8GiB", "a card of 8 GiB", 8),
        ("8 GB", "a card of 8 GiB", 8),
        ("6144MiB", "a card of 6 GiB", 6),
        ("RTX 4060", "RTX 4060", 8),
        ("rtx4060ti 16gb", "RTX 4060 Ti", 16),
        ("4060 Ti", "RTX 4060 Ti", 8),
        ("NVIDIA GeForce RTX 3060", "RTX 3060", 12),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop", 6),
        ("RTX 3080 12GB", "RTX 3080", 12),
        ("RTX-4070-Ti-Super", "RTX 4070 Ti Super", 16),
        ("Tesla T4", "T4", 16),
        ("a10", "A10", 24),
        ("RTX 5090", "RTX 5090", 32),
        ("A6000", "RTX A6000", 48),
        ("NVIDIA A100-SXM4-80GB", "A100", 80),
        ("RTX_3060 12 GB", "RTX 3060", 12),
        ("MX450 2GB", "a card of 2 GiB", 2),
    ],
)
def test_a_card_is_recognised_by_name_or_memory(text: str, name: str, gib: float) -> None:
    assert devices.parse(text) == devices.Device("cuda", name, gib)
    assert devices.parse(f"2x{text}") == devices.parse(f"2 x {text}") == devices.Device("cuda", name, gib, 2)


def test_cpu_is_this_machines_memory() -> None:
    device = devices.parse("CPU")
    assert (device.kind, device.gib > 0.5) == ("cpu", True)
    assert devices.parse("2xcpu").gib == pytest.approx(device.gib / 2)  # two processes share it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RTX 4061", 'did you mean --gpu "RTX 40'),
        ("RTX 4050", 'did you mean --gpu "RTX 4050 Laptop"'),
        ("24", 'did you mean --gpu "24GiB"'),
        ("banana", "unknown card: banana"),
        ("1e3GiB", "unknown card"),
        ("-4GiB", "-4GiB is not a memory size"),
        ("0 GB", "0 GB is not a memory size"),
        ("0x8GiB", "0 devices cannot be planned for"),
        ("99999x8GiB", "99999 devices cannot be planned for"),
        ("2xbanana", "unknown card: banana"),
        ("RX 7900 XTX 24GB", "only NVIDIA GPUs and the CPU"),
        ("Apple M3 Max", "only NVIDIA GPUs and the CPU"),
    ],
)
def test_an_unknown_card_is_an_error_with_a_fix(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        devices.parse(text)
    assert message in str(caught.value)
    assert "--gpu 8GiB" in str(caught.value)


def test_the_smallest_sufficient_card() -> None:
    assert devices.smallest_card(9.5) == "RTX 3080 (10 GiB)"
    assert devices.smallest_card(500) is None
