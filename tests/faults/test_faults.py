"""A run that was broken, killed, damaged or stopped anywhere ends with the weights of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def sweep(*args: str) -> dict:
    """The result of tests/faults/sweep.py; its cases fork from a process of their own, not from the tests'."""
    line = [sys.executable, str(ROOT / "tests" / "faults" / "sweep.py"), *args]
    done = subprocess.run(line, capture_output=True, text=True, timeout=2900, check=False)
    assert done.returncode in (0, 1) and done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_fault_of_every_kind_ends_with_the_same_weights() -> None:
    result = sweep("--sample", "1", "--seed", "5")
    assert result["failed"] == 0, json.dumps(result["modes"][0]["failed"], indent=1)
    assert result["cases"] == 5 and result["modes"][0]["calls"] > 100


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mode", ["lora", "qlora", "full", "seq2seq"])
def test_a_sample_of_faults_in_every_mode_ends_with_the_same_weights(mode: str) -> None:
    result = sweep("--mode", mode, "--sample", "25", "--seed", "7", "--tensorboard")
    assert result["failed"] == 0, json.dumps(result["modes"][0]["failed"], indent=1)
    assert result["cases"] == (125 if mode == "lora" else 100)
