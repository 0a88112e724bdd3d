"""Train: fine-tunes the model of a config on the processed rows, and leaves an adapter (or a model) to eval and infer.

    python scripts/train.py --config configs/run_bnb.yaml
    accelerate launch --config_file env/accelerate_config.yaml scripts/train.py --config configs/run_bnb.yaml

Reads data/processed (or what data.stage says); writes outputs/<run>, outputs/tb/<run> and adapters/<run>, or
outputs/<run>/model in full mode. Unfinished runs are taken up by themselves.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from sft import console

EXAMPLES = """
python scripts/train.py --config configs/run_bnb.yaml
python scripts/train.py --set tuning.mode=lora --set train.epochs=2
python scripts/train.py --dry-run
python scripts/train.py --resume outputs/run/checkpoint-200
"""


def build_parser() -> argparse.ArgumentParser:
    made = console.parser("Fine-tune a model on your rows.", EXAMPLES)
    made.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        default="auto",
        help="auto (the default) takes up the newest run if it is unfinished; never starts a new one; or a folder",
    )
    made.add_argument("--dry-run", action="store_true", help="show settings and steps; load no weights, make no run")
    made.add_argument("--force", action="store_true", help="try it though the plan says that it does not fit")
    made.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="resume though KEY of the stamp has changed"
    )
    return made


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    from sft import runs
    from sft.config.load import load
    from sft.preflight import disk_space
    from sft.training import preparation

    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("sft").setLevel(logging.ERROR)  # what is to be said, the first process says
    root = console.project_root()
    loaded = load(args.config, args.set, root=root)
    runs.check_place(loaded.config.train.output_dir, root)
    resumed = runs.open_run(loaded.config.train.output_dir, root, args.resume)
    with console.progress("reading rows") as report:
        job = preparation.prepare(loaded, root, report, resumed.checkpoint)

    from sft.memory import plan
    from sft.training import building, distributed, finish, measured, overview

    distributed.start()
    opened = distributed.on_rank0(lambda: runs.open_run(loaded.config.train.output_dir, root, args.resume))
    say(overview.before(job, opened))
    distributed.on_rank0(lambda: disk_space.require_disk_space(job.config, job.files, opened.run))
    asked = job.config.model_copy(update={"train": job.asked})
    distributed.on_rank0(
        lambda: plan.memory_check(asked, job.files, job.device, root, longest=job.rows.longest, force=args.force)
    )
    if args.dry_run:
        return overview.as_json(job, opened)
    with building.hold(job, opened, args.allow_change) as accepted:
        say([f"accepted, though changed since the run began: {change}" for change in accepted])
        with console.progress("training") as report:
            trainer = building.build(job, opened, root, report if sys.stderr.isatty() else None)
            trainer.fit(opened.checkpoint)
        finish.stop_if_asked(trainer, opened.run)
        summary = finish.finish(job, trainer, opened.run, root)
    if distributed.rank() != 0:
        return None
    measured.record_run(job, trainer, summary, root)
    say(overview.after(job, summary, opened.run, root))
    if job.config.train.merge_at_end and job.config.tuning.mode != "full":
        say([f"merged into {finish.merge(job, opened.run, root)}"])
    return summary


def say(lines: list[str]) -> None:
    """Prints on the first process alone, where a launcher has started several."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            console.say(line)


if __name__ == "__main__":
    console.run(build_parser(), main)
