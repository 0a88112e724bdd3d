"""Gathers what a bug report needs as one text: versions, machine, checks, last run, last error.

    python scripts/doctor.py --config configs/demo_cpu.yaml > report.txt

Reads everything, changes nothing. Tokens are redacted, the home folder is written as ~.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft import console
from sft.errors import redact


def build_parser() -> argparse.ArgumentParser:
    return console.parser(__doc__)


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft.model.hub import find_token
    from sft.preflight import doctor
    from sft.preflight.checks import CheckContext

    root = console.project_root()
    find_token(root)  # registers the token, so that `redact` replaces it
    report = {}
    for title, lines in doctor.sections(CheckContext(root, Path(args.config), args.set, 6006)):
        report[title] = [redact(line) for line in lines]
        console.say(f"## {title}")
        for line in report[title]:
            console.say(f"    {line}")
    return report


if __name__ == "__main__":
    console.run(build_parser(), main)
