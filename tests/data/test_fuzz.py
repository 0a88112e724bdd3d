"""The checks of fuzz.py, briefly and on fixed seeds; `make fuzz` draws new ones for five minutes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.data import fuzz


@pytest.mark.parametrize("check", fuzz.CHECKS, ids=lambda check: check.__name__)
def test_fuzz(check: Callable[..., None]) -> None:
    fuzz.check(check, 20261121, 40)
