"""Pause: stops the running training after its step, with a checkpoint; the same `make train` takes it up again.

    python scripts/pause.py            # every run that is going on
    python scripts/pause.py run-2      # that one

Puts a file `pause` into the run's folder, which the run looks for after each step.
"""

from __future__ import annotations

import argparse
from typing import Any

from sft import console

EXAMPLES = """
python scripts/pause.py
python scripts/pause.py run-2
"""


def build_parser() -> argparse.ArgumentParser:
    made = console.parser("Stop a running training after its step, with a checkpoint.", EXAMPLES, config=False)
    made.add_argument("run", nargs="?", help="the run's name (default: every run that is going on)")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft import runs
    from sft.errors import RunError

    going_on = runs.running(console.project_root())
    wanted = [run for run in going_on if args.run in (None, run.name)]
    if not wanted:
        names = ", ".join(run.name for run in going_on) or "none"
        what = f"{args.run} is not running" if args.run else "no training is running"
        raise RunError(what, where=f"running: {names}", fix="ls outputs")
    for run in wanted:
        (run.folder / runs.PAUSE).touch()
        console.say(f"{run.name} stops after its step; `make train` takes it up again")
    return {"paused": [run.name for run in wanted]}


if __name__ == "__main__":
    console.run(build_parser(), main)
