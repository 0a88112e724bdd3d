"""Stops the running training after its current step, with a checkpoint; `make train` resumes it.

    python scripts/pause.py            every running run
    python scripts/pause.py run-2      that one

Writes a file `pause` into the run's folder, which the run looks for after each step.
"""

from __future__ import annotations

import argparse
from typing import Any

from sft import console


def build_parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__, config=False)
    result.add_argument("run", nargs="?", help="the run's name (default: every running run)")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft import files, runs
    from sft.errors import RunError

    running = runs.running(console.project_root())
    selected = [run for run in running if args.run in (None, run.name)]
    if not selected:
        names = ", ".join(run.name for run in running) or "none"
        what = f"{args.run} is not running" if args.run else "no training is running"
        raise RunError(what, where=f"runs in progress: {names}", fix="make train starts one, make resume continues one")
    for run in selected:
        (run.folder / runs.PAUSE).touch()
        status = files.read_json(run.folder / runs.STATUS)
        at = f" ({status['phase']}, step {status['step']} of {status['total_steps']})" if "step" in status else ""
        console.say(f"{run.name}{at} stops after its current step. Continue with: make resume RUN={run.name}")
    return {"paused": [run.name for run in selected]}


if __name__ == "__main__":
    console.run(build_parser(), main)
