"""A deep model traced by two shallow ones gives the bytes of the whole trace, to the last one."""

from __future__ import annotations

import pytest

from sft.memory.trace import Tracer
from tests.memory.families import description
from tests.memory.settings import resolved

CASES = [
    ("qwen2", "qlora", "cuda", 8),
    pytest.param("t5", "full", "cpu", 10, marks=pytest.mark.slow),
    pytest.param("mixtral", "full", "cuda", 10, marks=pytest.mark.slow),
    pytest.param(
        "gemma3_text", "lora", "cpu", 38, marks=pytest.mark.slow
    ),  # five layers with a window, then one without
    pytest.param("t5", "qlora", "cuda", 11, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "mode", "device", "layers"), CASES)
def test_a_folded_trace_is_the_whole_one(family: str, mode: str, device: str, layers: int) -> None:
    depth = "num_layers" if family == "t5" else "num_hidden_layers"
    config, model = resolved(mode, device), {**description(family), depth: layers}
    folded, whole = (Tracer(config, model, device=device, fold=fold) for fold in (True, False))
    assert folded.out > 0 == whole.out
    for fact in ("parameters", "standing", "moments"):
        assert getattr(folded, fact) == getattr(whole, fact)
    for waiting in (True, False):
        assert folded.step([192, 192], waiting=waiting) == whole.step([192, 192], waiting=waiting)
    assert folded.evaluation([192, 192]) == whole.evaluation([192, 192])
    assert folded.generation(4, 100, 50) == whole.generation(4, 100, 50)
    assert folded.out > 0
