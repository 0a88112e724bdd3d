"""What the processes of one run exchange: sums in buckets, results and errors of the first process."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sft.errors import EnvironmentProblem, RunError
from sft.training import distributed, result
from tests.conftest import ROOT

TWO_PROCESSES = """
import sys
sys.path.insert(0, "scripts")
import torch
from sft.errors import ConfigError, RunError
from sft.training import distributed

rank = distributed.rank()
try:
    distributed.start({"train": {"seed": 7 + rank, "epochs": 2}})
    raise AssertionError("no error")
except ConfigError as error:
    assert "rank 1 has another config than rank 0: train.seed is 8, not 7" in str(error)
    assert error.where == "train.seed"
assert distributed.on_rank0(lambda: ["a value", 1]) == ["a value", 1]
assert distributed.largest([rank, 5 - rank]) == [1, 5]

def fail():
    raise ValueError("a bug on one process")

try:
    distributed.on_rank0(fail)
    raise AssertionError("no error")
except ValueError:
    assert rank == 0
except RunError as error:
    assert rank == 1 and "ValueError: a bug on one process" in str(error)

distributed.BUCKET_BYTES = 40
weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 8, 1, 30)] + [torch.nn.Parameter(torch.zeros(()))]
if rank == 0:  # the other one has an empty share of the step
    for index, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, index + 0.5)
distributed.sum_gradients(weights)
assert all(bool((weight.grad == index + 0.5).all()) for index, weight in enumerate(weights))
assert distributed.all_gather(rank) == [0, 1]
torch.distributed.barrier()  # neither process ends while the other one still receives
torch.distributed.destroy_process_group()
"""


def test_one_process_gets_its_own_result_and_its_own_error() -> None:
    assert distributed.on_rank0(lambda: 3) == 3
    assert distributed.largest([1, 2]) == [1, 2] and distributed.all_gather("x") == ["x"]
    with pytest.raises(ValueError, match="mine"):
        distributed.on_rank0(lambda: (_ for _ in ()).throw(ValueError("mine")))
    with pytest.raises(RunError, match="ours"):
        distributed.on_rank0(lambda: (_ for _ in ()).throw(RunError("ours")))


def test_the_end_of_a_run_fails_on_every_process_with_the_error_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values: values.__setitem__(1, RunError("disk full")))
    loop: Any = SimpleNamespace(load_best=lambda: None, model=torch.nn.Linear(1, 1))
    unused: Any = None
    with pytest.raises(RunError, match="disk full"):
        result.finish(unused, loop, unused, unused)


def test_gradients_are_reduced_in_buckets_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[float]] = []

    def both_have_the_same(values: torch.Tensor) -> None:
        sent.append(values.tolist())
        values.mul_(2)

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 40)
    monkeypatch.setattr(dist, "all_reduce", both_have_the_same)
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4, 1, 30)]
    weights.append(torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float64)))
    for value, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, value)
    distributed.sum_gradients(weights)
    assert [len(bucket) for bucket in sent] == [8, 30, 2]
    assert all(bool((weight.grad == 2 * value).all()) for value, weight in enumerate(weights))
    assert weights[4].grad is not None and weights[4].grad.shape == (2, 1)


@pytest.mark.slow
def test_a_process_without_its_launchers_variables_says_which(tmp_path: Path) -> None:
    code = "from sft.training import distributed; distributed.start()"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK", "LOCAL_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "scripts",
        env={**env, "WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "the 2 processes of this run do not meet" in done.stderr
    assert "MASTER_ADDR=(not set)" in done.stderr and "make train-multi NPROC=2" in done.stderr


@pytest.mark.slow
def test_two_processes_exchange_results_errors_and_gradients() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES],
            cwd=ROOT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "1", "DeepSpeed: one process shares nothing"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1", "DeepSpeed: zero_stage 1: only 2 and 3 are supported"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "DeepSpeed: offload to nvme is not supported"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.3", "DeepSpeed: gradient_clipping: the config of the run decides this"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, setting in (("WORLD_SIZE", "2"), ("ACCELERATE_USE_DEEPSPEED", "true")):
        monkeypatch.setenv(name, setting)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="DeepSpeed is not installed"):
        distributed.sharding()
    monkeypatch.setattr(distributed, "require_deepspeed", lambda: None)
    assert distributed.sharding_name() == "DeepSpeed ZeRO-2 on 2 ranks"  # accelerate's default
    monkeypatch.setenv(variable, value)
    with pytest.raises(EnvironmentProblem, match=message):
        distributed.sharding()
