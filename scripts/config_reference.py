"""Writes docs/CONFIG.md, the table of every configuration key, from the schema.

python scripts/config_reference.py            writes the page
python scripts/config_reference.py --check    exit 2 when the page does not match the schema
"""

from __future__ import annotations

import argparse
from typing import Any

from sft import console


def build_parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__, config=False)
    result.add_argument("--out", metavar="FILE", help="where to write (default: docs/CONFIG.md of the project)")
    result.add_argument("--check", action="store_true", help="write nothing; exit 2 when the file is out of date")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from sft import files
    from sft.config import reference
    from sft.errors import ConfigError

    path = Path(args.out) if args.out else console.project_root() / "docs" / "CONFIG.md"
    text = reference.markdown()
    current = path.exists() and path.read_text(encoding="utf-8") == text
    if args.check and not current:
        raise ConfigError(f"{path} does not match the schema", fix="python scripts/config_reference.py")
    if not current:
        files.write_text(path, text)
    keys = sum(1 for field in reference.table().values() if not field.section)
    console.say(f"{path}: {keys} keys, {'unchanged' if current else 'written'}")
    return {"path": str(path), "keys": keys, "written": not current}


if __name__ == "__main__":
    console.run(build_parser(), main)
