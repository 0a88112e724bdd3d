"""Checks everything a run needs without loading a model: each line is ok, a warning or an error, with its fix.

    python scripts/check.py --config configs/demo_cpu.yaml
    make check TB_PORT=6007

Reads the config, the first rows of the data, the headers of the model's files, the template, the machine; writes
nothing. Exit 2 where anything is an error.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__)
    result.add_argument("--port", type=int, default=6006, help="TensorBoard's port (default 6006)")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every check, prints its line, and fails if one of them did."""
    from sft.errors import EnvironmentProblem
    from sft.preflight import checks

    context = checks.CheckContext(console.project_root(), Path(args.config), args.set, args.port)
    findings = checks.run(context)
    for each in findings:
        console.say(f"{each.level:8} {each.name:12} {each.message}")
        if each.fix:
            console.say(f"{'':21} fix: {each.fix}")
    errors = [each for each in findings if each.level == "error"]
    warnings = sum(each.level == "warning" for each in findings)
    result = {"ok": not errors, "findings": [asdict(each) for each in findings]}
    if errors:
        failed = EnvironmentProblem(
            f"{len(errors)} of {len(findings)} checks failed: {', '.join(dict.fromkeys(e.name for e in errors))}",
            fix="follow the fix of each line marked error",
        )
        failed.details = result
        raise failed
    console.say(f"all {len(findings)} checks passed" + (f", {warnings} with a warning" if warnings else ""))
    return result


if __name__ == "__main__":
    console.run(parser(), main)
