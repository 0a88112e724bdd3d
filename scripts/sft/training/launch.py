"""Starts the processes of a run on this machine: `accelerate launch` with a file of env/; and names the one that ended.

Where memory runs out on a rank of a sharded run, which cannot repeat the step alone, all start again from the newest
checkpoint with the smaller micro-batch that it names, unless the config names one.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import psutil

from sft.config.load import shipped
from sft.errors import EnvironmentProblem, RunError, one_line
from sft.training.distributed import LOST, require_deepspeed

BUDGET = re.compile(r"--set train\.micro_batch_tokens=\d+")
log = logging.getLogger("sft.training")


def launch(processes: int, shard: str, root: Path, arguments: list[str], *, budget: int | str, again: str) -> None:
    """Runs scripts/train.py with `arguments` in this many processes. budget: the config's `micro_batch_tokens`. again:
    the command that goes on with the run.

    Exits with the code of a rank that ended with a message of its own; raises EnvironmentProblem, and RunError for a
    rank that ended without.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if shard == "deepspeed":
        require_deepspeed()
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    most = gpus or cores
    if not 2 <= processes <= most:
        what = f"a run in several processes has 2 or more, each on a {'GPU' if gpus else 'CPU core'} of its own"
        what += f"; this machine has {most}, and {processes} was named"
        fix = f"--nproc {most}" if processes > most > 1 else "one process: make train"
        raise EnvironmentProblem(what, where="--nproc", fix=fix)
    os.environ["SFT_AGAIN"] = again
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would print that it has found none
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `_report` names what ended
    command = ["--config_file", str(shipped(root, f"env/accelerate_{shard}_2.yaml")), "--num_processes", str(processes)]
    command += ["--main_process_port", "0", str(shipped(root, "scripts/train.py")), *arguments]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # torch's agent would kill a rank after 30 seconds
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _forward)
    while True:
        settings = launch_command_parser().parse_args(command)
        settings.signals_to_handle, settings.local_ranks_filter = "SIGQUIT", "0"  # what all say is shown once
        try:
            launch_command(settings)
            return
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            smaller = BUDGET.search(" ".join(map(_last_error, error.failures.values())))
            if smaller is None or budget != "auto":
                _report(error.failures, again)
        log.warning("memory ran out: all processes start again from the newest checkpoint with %s", smaller[0])
        command += [*([] if "newest" in arguments else ["--resume", "auto"]), *smaller[0].split()]


def _forward(number: int, _: object) -> None:
    """Sends a signal on to all ranks, which are no part of the terminal's process group: they stop after their step."""
    for process in psutil.Process().children():
        process.send_signal(number)


def _last_error(failure: Any) -> str:
    message = failure.message
    return str(message["message"] if isinstance(message, dict) else message)


def _report(failures: dict[int, Any], again: str) -> NoReturn:
    """Names the rank that ended of itself; the first one has shown its own message. Others end because it did."""
    errors = {rank: _last_error(failure) for rank, failure in failures.items()}
    ended = [rank for rank in sorted(errors) if failures[rank].exitcode != -signal.SIGTERM and LOST not in errors[rank]]
    rank = ended[0] if ended else min(errors)
    code = failures[rank].exitcode
    if code in (130, 143) or (rank == 0 and code > 1):
        sys.exit(code)
    hint = "; SIGKILL is what the system sends where memory runs out" if code == -signal.SIGKILL else ""
    what = f"rank {rank} ended with exit code {code}, and so all did: {one_line(errors[rank])}{hint}"
    raise RunError(what, fix=f"{again}  # goes on from the newest checkpoint")
