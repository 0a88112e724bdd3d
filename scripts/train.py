"""Fine-tunes the model of a config on the processed rows, and leaves an adapter (or a model) to eval and infer.

    python scripts/train.py --config configs/run_bnb.yaml
    python scripts/train.py --set tuning.mode=lora --set train.epochs=2 --dry-run
    python scripts/train.py --resume outputs/run/checkpoint-200
    python scripts/train.py --nproc 2 --shard fsdp --set tuning.mode=full

Reads data/processed (or what data.stage says); writes outputs/<run>, outputs/tb/<run> and adapters/<run>, or
outputs/<run>/model in full mode. Unfinished runs resume automatically.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from sft import console


def build_parser() -> argparse.ArgumentParser:
    parser = console.parser(__doc__)
    parser.add_argument(
        "--resume",
        metavar="auto|newest|never|PATH",
        default="auto",
        help="auto (default): resume the newest run of this config if it is unfinished, else start one; newest: resume"
        " the newest unfinished run with its own config; never: start a run; or the folder of a run or checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="show settings and steps; load no weights, start no run")
    parser.add_argument(
        "--until",
        metavar="STEP",
        type=float,
        help="stop with an evaluation and a checkpoint after this step, or this share of the steps (0.25); the same"
        " command without it goes on, with the same schedule",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="every figure of each evaluation")
    parser.add_argument("--force", action="store_true", help="train even if the memory plan says that it does not fit")
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="resume although this setting has changed (the error names the keys)",
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="train in so many processes, one a GPU; or on the CPU")
    parser.add_argument(
        "--shard",
        choices=["ddp", "fsdp", "deepspeed"],
        help="with --nproc: each process has a copy of the model (ddp, the default), or they share it",
    )
    return parser


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    if "RANK" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(train)(args)  # for the launcher: the last error of this process
    if args.nproc is None and args.shard is None:
        return train(args)
    from sft.config.load import load
    from sft.training.launch import launch

    root = console.project_root()
    resume_newest(args, root)
    budget = load(args.config, args.set, root=root).config.train.micro_batch_tokens  # an error in it is shown once
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--nproc")
    own.add_argument("--shard")
    arguments = own.parse_known_args(sys.argv[1:])[1]
    processes = 2 if args.nproc is None else args.nproc
    launch(processes, args.shard or "ddp", root, arguments, budget=budget, again=console.continue_command(""))
    return None


def resume_newest(args: argparse.Namespace, root: Path) -> None:
    """--resume newest: the run and its own config."""
    from sft import runs

    if args.resume == "newest" and args.config == console.default_config():
        args.run = runs.unfinished(root).name
        args.config = str(runs.named(args.run, root).settings)


def train(args: argparse.Namespace) -> dict[str, Any] | None:
    from sft import runs
    from sft.errors import Stopped
    from sft.memory import plan
    from sft.preflight import disk_space
    from sft.training import distributed, result
    from sft.training import job as jobs

    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("sft").setLevel(logging.ERROR)  # warnings are for the first process to give
    elif args.verbose:
        logging.getLogger("sft").setLevel(logging.DEBUG)
    root = console.project_root()

    # 1. the config and the run
    resume_newest(args, root)
    if args.run and args.resume in ("auto", "newest"):
        args.resume = str(runs.named(args.run, root).folder)
    loaded = console.load_config(args)
    output_dir = loaded.config.train.output_dir
    runs.check_place(output_dir, root)
    distributed.start(loaded.config.model_dump())
    opened = distributed.on_rank0(lambda: runs.open_run(output_dir, root, args.resume))

    # 2. the rows, and every setting resolved
    with console.progress("reading rows") as report:
        job = jobs.prepare(loaded, root, report, opened.checkpoint)
    say(jobs.describe(job, opened))

    # 3. whether disk and memory suffice
    distributed.on_rank0(lambda: disk_space.require_disk_space(job.config, job.files, opened.run))
    train = job.unresolved.model_copy(update={"rehearsal": job.config.train.rehearsal})
    unresolved = job.config.model_copy(update={"train": train})
    ranks, shared = distributed.world(), distributed.what_is_shared()
    distributed.on_rank0(
        lambda: plan.memory_check(
            unresolved,
            job.files,
            job.device,
            longest=job.longest,
            force=args.force,
            ranks=ranks,
            sharding=shared,
        )
    )
    if args.dry_run:
        return jobs.as_json(job, opened)

    with jobs.hold_run(job, opened, args.allow_change) as accepted:
        say([f"accepted, though changed since the run began: {change}" for change in accepted])
        # 4. the model, 5. the training loop
        continue_command = console.continue_command(opened.run.name)
        try:
            with console.progress("training", remaining=False) as report:
                job, loop = jobs.make_loop(job, opened, root, report if sys.stderr.isatty() else None)
                loop.fit(opened.checkpoint, until=jobs.step_of_share(args.until, job.schedule))
        except KeyboardInterrupt:  # while the model was loaded, or the second Ctrl-C
            saved = opened.run.checkpoints()
            what = (
                f"Stopped at once; the last checkpoint is {saved[-1].name}." if saved else "Stopped: no checkpoint yet."
            )
            raise Stopped(what, fix=continue_command) from None
        result.require_finished(loop, continue_command)
        if not loop.complete:
            return result.stopped_by_until(loop, opened.run)
        # 6. the adapter or model, the summary
        summary = result.finish(job, loop, opened.run, root)
    if distributed.rank() != 0:
        return None
    say(result.describe_result(job, summary, root))

    # 7. merged weights, where the config asks for them
    if job.config.train.merge_at_end and job.config.tuning.mode != "full":
        summary["merged"] = merge_adapter(opened.run.adapter_dir, opened.run.folder / "merged", root)
    return summary


def merge_adapter(adapter: Path, merged: Path, root: Path) -> str | None:
    """Merges a finished run's adapter; None, with a warning, where it cannot be merged: the run is finished anyway."""
    from sft.config.load import display_path
    from sft.errors import SftError
    from sft.ship.merge import merge

    command = f"--adapters {display_path(adapter, root)} --out {display_path(merged, root)}"
    try:
        merge(adapter, merged, "fp16", root)
    except (SftError, OSError) as error:
        again = f"python scripts/merge_lora.py {command}"
        console.warn(f"{adapter.name} is trained, but not merged: {error}\n  again: {again}")
        return None
    console.say(f"merged into {display_path(merged, root)}")
    return str(merged)


def say(lines: list[str]) -> None:
    """Prints on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            console.say(line, wrap=True)


if __name__ == "__main__":
    console.run(build_parser(), main)
