"""Weights that two processes share (FSDP2, gloo on the CPU): the same steps as one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import ROOT
from tests.training import sharded


def launch(count: int, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ...` in `count` processes that share the weights."""
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"scripts{os.pathsep}.", **fsdp, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_processes_that_share_the_weights_train_as_one(tiny_qwen2: Path, tmp_path: Path) -> None:
    done = launch(2, "-m", "tests.training.sharded", tiny_qwen2, tmp_path)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for case in sharded.CASES:
        expected = sharded.train(tiny_qwen2, tmp_path / "one", case)
        for key in (1, 2):
            assert len(results[case][key]) == len(expected[key]) > 0
            assert all(abs(a - b) < 1e-5 for a, b in zip(results[case][key], expected[key], strict=True)), case
        weights, alone = results[case][0], expected[0]
        assert set(alone) <= set(weights)
        assert all(float((weights[name] - alone[name]).abs().max()) < 1e-5 for name in alone), case
        resumed = results[f"{case} resumed"]
        assert resumed[1:] == results[case][1:]
        assert all(torch.equal(resumed[0][name], weight) for name, weight in weights.items()), case
