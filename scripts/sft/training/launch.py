"""Starts the processes of a run on this machine: `accelerate launch` with a file of env/; and names the one that ended.

Where memory runs out on a rank of a sharded run, which cannot repeat the step alone, all start again from the newest
checkpoint with the smaller micro-batch that it names, unless the config names one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from sft.config.load import shipped
from sft.errors import EnvironmentProblem, RunError, one_line

FILES = {"ddp": "env/accelerate_ddp_2.yaml", "fsdp": "env/accelerate_fsdp_2.yaml", "deepspeed": None}
BUDGET = re.compile(r"--set train\.micro_batch_tokens=\d+")
log = logging.getLogger("sft.training")


def launch(processes: int, shard: str, root: Path, arguments: list[str], *, budget: int | str) -> None:
    """Runs scripts/train.py with `arguments` in this many processes. budget: the config's `micro_batch_tokens`.

    Exits with the code of a rank that ended with a message of its own; raises EnvironmentProblem, and RunError for a
    rank that ended without.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if (file := FILES[shard]) is None:
        raise EnvironmentProblem(
            "DeepSpeed is not supported: fsdp shards the same states as ZeRO-3, and as ZeRO-2 with"
            f" fsdp_reshard_after_forward: false in {FILES['fsdp']}",
            where="--shard deepspeed",
            fix="--shard fsdp",
        )
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if not 1 <= processes <= (gpus or cores):
        what = f"{processes} processes on {f'{gpus} GPUs' if gpus else f'{cores} CPU cores'}"
        raise EnvironmentProblem(what, where="--nproc", fix=f"--nproc {gpus or cores}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `_report` names what ended
    command = ["--config_file", str(shipped(root, file)), "--num_processes", str(processes)]
    command += ["--main_process_port", "0", str(shipped(root, "scripts/train.py")), *arguments]
    while True:
        try:
            launch_command(launch_command_parser().parse_args(command))
            return
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            smaller = BUDGET.search(" ".join(map(_last_error, error.failures.values())))
            if smaller is None or budget != "auto":
                _report(error.failures)
        log.warning("memory ran out: all processes start again from the newest checkpoint with %s", smaller[0])
        command += ["--resume", "auto", *smaller[0].split()]


def _last_error(failure: Any) -> str:
    message = failure.message
    return str(message["message"] if isinstance(message, dict) else message)


def _report(failures: dict[int, Any]) -> NoReturn:
    """Names the rank that was the first to end; one that ended with a message, or because of another, comes last."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    rank = min(codes, key=lambda rank: (codes[rank] in (2, 130, 143, -15), codes[rank] == -15, rank))
    if (code := codes[rank]) in (2, 130, 143):
        sys.exit(code)
    hint = "; SIGKILL is what the system sends where memory runs out" if code == -9 else ""
    raise RunError(
        f"rank {rank} ended with exit code {code}, and so all did: {one_line(_last_error(failures[rank]))}{hint}",
        fix="the same command resumes from the newest checkpoint",
    )
