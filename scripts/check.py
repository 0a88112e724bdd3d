"""Looks over everything a run needs, without loading a model: each line ok, a warning or an error, with its fix.

    python scripts/check.py
    python scripts/check.py --config configs/demo_cpu.yaml --json

Reads the config, the data files' first rows, the model's file headers, the template, the machine. Writes nothing.
Exit 2 where anything is an error.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = console.parser(
        "Check environment, config, data, template, model, disk, memory and ports; no model is loaded.",
        """python scripts/check.py
python scripts/check.py --config configs/demo_cpu.yaml
make check TB_PORT=6007""",
    )
    made.add_argument("--port", type=int, default=6006, help="TensorBoard's port (default 6006)")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every check, prints its line, and fails if one of them did."""
    from sft.errors import EnvironmentProblem
    from sft.preflight import checks

    case = checks.Case(console.project_root(), Path(args.config), args.set, args.port)
    findings = checks.run(case)
    for found in findings:
        console.say(f"{found.level:8} {found.name:12} {found.said}")
        if found.fix:
            console.say(f"{'':21} fix: {found.fix}")
    errors = [found for found in findings if found.level == "error"]
    warnings = sum(found.level == "warning" for found in findings)
    result = {"ok": not errors, "findings": [asdict(found) for found in findings]}
    if errors:
        failed = EnvironmentProblem(
            f"{len(errors)} of {len(findings)} checks failed: {', '.join(dict.fromkeys(e.name for e in errors))}",
            fix="the lines marked error say how",
        )
        failed.details = result
        raise failed
    console.say(f"all {len(findings)} checks passed" + (f", {warnings} with a warning" if warnings else ""))
    return result


if __name__ == "__main__":
    console.run(parser(), main)
