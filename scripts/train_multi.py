"""Trains in several processes, one for each GPU (or several on the CPU): `accelerate launch` with a file of env/.

    python scripts/train_multi.py --nproc 2 --config configs/run_bnb.yaml
    python scripts/train_multi.py --nproc 2 --shard fsdp --set tuning.mode=full

ddp: each process has a copy of the model. fsdp: they share its weights, gradients and optimizer states, for models that
are too large for one GPU. All other flags are those of scripts/train.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from typing import Any, NoReturn

import train
from sft import console

FILES = {"ddp": "env/accelerate_ddp_2.yaml", "fsdp": "env/accelerate_fsdp_2.yaml", "deepspeed": None}
BUDGET = re.compile(r"--set train\.micro_batch_tokens=\d+")  # the fix of a rank on which memory ran out


def build_parser() -> argparse.ArgumentParser:
    parser = train.build_parser()
    parser.description = __doc__
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="how many processes (default: 2)")
    parser.add_argument("--shard", choices=list(FILES), default="ddp", help="how they share the work (default: ddp)")
    return parser


def main(args: argparse.Namespace) -> None:
    from sft.config.load import shipped
    from sft.errors import EnvironmentProblem

    if (file := FILES[args.shard]) is None:
        raise EnvironmentProblem(
            "DeepSpeed is not supported: fsdp shards the same states as ZeRO-3, and as ZeRO-2 with"
            f" fsdp_reshard_after_forward: false in {FILES['fsdp']}",
            where="--shard deepspeed",
            fix="--shard fsdp",
        )
    budget = console.load_config(args).config.train.micro_batch_tokens  # an error in the config is shown once

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if not 1 <= args.nproc <= (gpus or cores):
        what = f"{args.nproc} processes on {f'{gpus} GPUs' if gpus else f'{cores} CPU cores'}"
        raise EnvironmentProblem(what, where="--nproc", fix=f"--nproc {gpus or cores}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // args.nproc)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `report` says what ended
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--nproc")
    own.add_argument("--shard")
    root = console.project_root()
    launch = ["--config_file", str(shipped(root, file)), "--num_processes", str(args.nproc), "--main_process_port", "0"]
    launch += [str(shipped(root, "scripts/train.py")), *own.parse_known_args(sys.argv[1:])[1]]
    while True:
        try:
            return launch_command(launch_command_parser().parse_args(launch))
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            smaller = BUDGET.search(" ".join(map(last_error, error.failures.values())))
            if smaller is None or budget != "auto":
                report(error.failures)
        console.say(f"memory ran out: all processes start again from the newest checkpoint with {smaller[0]}")
        launch += ["--resume", "auto", *smaller[0].split()]


def last_error(failure: Any) -> str:
    """What a process that failed wrote for the launcher."""
    message = failure.message
    return str(message["message"] if isinstance(message, dict) else message)


def report(failures: dict[int, Any]) -> NoReturn:
    """Names the rank that ended first of itself, with its last error. A rank that ended with a message of its own, or
    because another one did, says so itself: its exit code is that of the command.
    """
    from sft.errors import RunError, one_line

    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    rank = min(codes, key=lambda rank: (codes[rank] in (2, 130, 143, -15), codes[rank] == -15, rank))
    if (code := codes[rank]) in (2, 130, 143):
        sys.exit(code)
    last = one_line(last_error(failures[rank]))
    hint = "; SIGKILL is what the system sends where memory runs out" if code == -9 else ""
    raise RunError(
        f"rank {rank} ended with exit code {code}, and so all did: {last}{hint}",
        fix="the same command resumes from the newest checkpoint",
    )


if __name__ == "__main__":
    console.run(build_parser(), main)
