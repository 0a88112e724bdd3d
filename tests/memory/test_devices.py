"""Cards by name and by size, as people write them."""

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
    ],
)
def test_a_card_is_found(text: str, name: str, gib: float) -> None:
    assert devices.parse(text) == devices.Device("cuda", name, gib)


def test_cpu_is_this_machines_memory() -> None:
    found = devices.parse("CPU")
    assert (found.kind, found.gib > 0.5) == ("cpu", True)


def test_an_unknown_card_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        devices.parse("RTX 4061")
    assert "RTX 40" in str(caught.value)
    assert "--gpu 8GiB" in str(caught.value)


def test_the_smallest_card_that_would_do() -> None:
    assert devices.smallest_card(9.5) == "RTX 3080 (10 GiB)"
    assert devices.smallest_card(500) is None
