"""What each process of a run does in test_sharded.py: `... -m tests.training.sharded MODEL FOLDER CASES`.

Trains each case, and resumes it from its third step; with RESUMED only that, from the checkpoints that FOLDER has.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from sft.model import shard
from sft.training import distributed
from tests.training import bench

# 9 rows in steps of 4: one rank has no row in the last step of an epoch; row 1 has no loss token
CASES: dict[str, Any] = {
    "full": {"tuning": {"mode": "full"}, "train": {"learning_rate": 1e-3}},
    "lora": {"tuning": {"lora": {"r": 4, "dropout": 0.0}}},
    "qlora": {"tuning": {"mode": "qlora", "lora": {"r": 4, "dropout": 0.0}}},
    "bf16": {"tuning": {"mode": "full"}, "train": {"learning_rate": 1e-4, "bf16": True}},
    # each rank has a copy, in fp64: AdamW turns fp32's rounding of a gradient near zero into 1e-6 of a weight
    "copies": {"tuning": {"lora": {"r": 4, "dropout": 0.0}}, "train": {"micro_batch_tokens": 64}},
}


def run_out_of_memory(loop: bench.TrainingLoop) -> None:
    """Memory runs out once, in the second step."""
    failures: list[int] = []

    def fail(*_: Any) -> None:
        if torch.is_grad_enabled() and loop.progress.global_step == 1 and not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("out of memory: injected")

    loop.model.get_base_model().model.layers[1].register_forward_hook(fail)


def train(
    model: Path, folder: Path, case: str, checkpoint: str | None = None
) -> tuple[dict[str, Any], list[float], list[float], list[int]]:
    """The trained weights, the losses, the validation losses and each rank's budget; resumed from `checkpoint`."""
    if distributed.world() > 1:
        os.environ["ACCELERATE_USE_FSDP"] = str(case != "copies")
    sections = {**CASES[case], "train": {"epochs": 2, "micro_batch_tokens": 24, **CASES[case].get("train", {})}}
    loop = bench.make_loop(bench.config(model, folder / "outputs" / case, **sections), rows=9, validation=3)
    loop.rows[1]["labels"] = [-100] * len(loop.rows[1]["labels"])
    if case == "copies":
        loop.model.double()
        if distributed.rank() == 1 and checkpoint is None:
            run_out_of_memory(loop)
    loop.fit(folder / "outputs" / case / checkpoint if checkpoint else None)
    state = shard.whole_state(loop.model)
    weights = bench.trained(loop) if state is None else state
    budgets = distributed.all_gather(loop.step.micro_batch_tokens)
    return weights, bench.logged(loop, "loss"), bench.logged(loop, "eval_loss"), budgets


if __name__ == "__main__":
    model, folder = map(Path, sys.argv[1:3])
    distributed.start()
    cases = sys.argv[3].split(",")
    results = {} if "RESUMED" in sys.argv else {case: train(model, folder, case) for case in cases}
    results |= {f"{case} resumed": train(model, folder, case, "checkpoint-3") for case in cases}
    if distributed.rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
