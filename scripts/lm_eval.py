"""Runs tasks of lm-evaluation-harness on the base and on the tuned model, where the harness is installed.

python scripts/lm_eval.py --tasks hellaswag,arc_easy          the newest run and its base
python scripts/lm_eval.py --tasks gsm8k --limit 100 --adapters adapters/my-run
The harness writes into outputs/<run>/lm_eval/{tuned,base}; its tasks come from the hub, its options after `--`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sft import console

EXAMPLES = """
python scripts/lm_eval.py --tasks hellaswag,arc_easy --limit 200
python scripts/lm_eval.py --tasks ifeval --chat -- --num_fewshot 0
"""
LEAST = (0, 4, 9)


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = console.parser("Run lm-evaluation-harness tasks on base and tuned model.", EXAMPLES)
    made.add_argument("--tasks", required=True, metavar="A,B", help="names of the harness's tasks")
    made.add_argument("--adapters", type=Path, metavar="DIR", help="an adapter (default: the newest run's)")
    made.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    made.add_argument("--chat", action="store_true", help="put the chat template around the questions")
    made.add_argument("--tuned-only", action="store_true", help="leave the base out")
    made.add_argument("options", nargs="*", metavar="-- OPTION", help="more options, handed to the harness as they are")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Find the model, run the harness once a side, put both sides' results beside each other."""
    from sft.errors import ConfigError
    from sft.generation import load
    from sft.report import harness

    check_installed()
    if not args.tasks.strip():
        raise ConfigError("no tasks are named", fix="make lm-eval TASKS=hellaswag,arc_easy")
    root = console.project_root()
    target = load.resolve_model(
        Path(args.config),
        args.set,
        adapters=args.adapters,
        is_default=args.config == console.default_config(),
        root=root,
    )
    found: dict[str, dict[str, float]] = {}
    folder = root / "outputs" / target.name / "lm_eval"
    for side in ["tuned"] if args.tuned_only else ["tuned", "base"]:
        command = harness.command(target, side, root, args.tasks, folder / side, args.limit, chat=args.chat)
        console.say(f"{side}: {' '.join(command[1:])}")
        done = subprocess.run([*command, *args.options], stdout=sys.stderr, check=False, cwd=folder.parent)
        harness.check(done.returncode, side)
        found[side] = harness.read(folder / side)
    console.table(f"{target.name}, {args.tasks}", *harness.table(found))
    console.say(f"\nwritten to {folder}")
    return {"run": target.name, "tasks": args.tasks.split(","), **found}


def check_installed() -> None:
    """Raises EnvironmentProblem, with what to install, where the harness is missing or too old."""
    from sft.errors import EnvironmentProblem

    fix = f"{sys.executable} -m pip install 'lm_eval[hf]>={'.'.join(map(str, LEAST))}'"
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem("lm-evaluation-harness is not installed", fix=fix) from None
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < LEAST:
        raise EnvironmentProblem(f"lm-evaluation-harness {version} is too old", fix=fix)


if __name__ == "__main__":
    console.run(parser(), main)
