"""Two processes that share the weights (FSDP2, DeepSpeed) or have a copy each (gloo on the CPU): as one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.training import sharded

DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed"
)
NEAR = {"bf16": 3e-2, "copies": 1e-12}


def launch(count: int, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ...` in `count` processes that share the weights: with FSDP2, or as `env` says."""
    env = env or {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    path = os.pathsep.join(filter(None, ("scripts", ".", os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def differences(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    assert set(others) <= set(weights)
    return max(float((weights[name] - other).abs().max()) for name, other in others.items())


@pytest.mark.parametrize(
    ("cases", "zero"),
    [
        ("full,lora,copies", ""),
        pytest.param("qlora,bf16", "", marks=pytest.mark.slow),
        pytest.param("full,lora,qlora,bf16", "2", marks=[pytest.mark.slow, DEEPSPEED]),
        pytest.param("full,lora,qlora,bf16", "3", marks=[pytest.mark.slow, DEEPSPEED]),
        pytest.param("full,lora", "3 offloaded", marks=[pytest.mark.slow, DEEPSPEED]),
    ],
)
def test_two_processes_train_as_one(cases: str, zero: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": zero[0]} if zero else {}
    if "offloaded" in zero:
        env |= {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "cpu" for what in ("OPTIMIZER", "PARAM")}
    done = launch(2, "-m", "tests.training.sharded", tiny_qwen2, tmp_path, cases, **env)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for case in cases.split(","):
        expected = sharded.train(tiny_qwen2, tmp_path / "one", case)
        weights, near = results[case][0], NEAR.get(case, 1e-5)
        for key in (1, 2):
            assert len(results[case][key]) == len(expected[key]) > 0
            assert all(abs(a - b) < near for a, b in zip(results[case][key], expected[key], strict=True)), case
        assert differences(weights, expected[0]) < near, case
        resumed = results[f"{case} resumed"]
        assert resumed[1:] == results[case][1:]
        assert differences(resumed[0], weights) == 0, case
    if "copies" in results:  # memory ran out on one rank, and both go on in smaller micro-batches
        first, second = results["copies"][3]
        assert first == second < sharded.CASES["copies"]["train"]["micro_batch_tokens"]


@pytest.mark.slow
def test_four_processes_resume_what_two_began(tiny_qwen2: Path, tmp_path: Path) -> None:
    done = launch(2, "-m", "tests.training.sharded", tiny_qwen2, tmp_path, ",".join(sharded.CASES))
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "results.pt", weights_only=True)
    done = launch(4, "-m", "tests.training.sharded", tiny_qwen2, tmp_path, ",".join(sharded.CASES), "RESUMED")
    assert done.returncode == 0, done.stderr
    four = torch.load(tmp_path / "results.pt", weights_only=True)
    for case in sharded.CASES:
        (weights, losses, validation, _), (others, *expected, _) = four[f"{case} resumed"], two[case]
        near = NEAR.get(case, 1e-5)
        assert differences(weights, others) < near, case
        for values, others in zip((losses, validation), expected, strict=True):
            assert len(values) == len(others) and all(abs(a - b) < near for a, b in zip(values, others, strict=True))
