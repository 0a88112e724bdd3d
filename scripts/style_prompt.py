"""Puts a style ("Answer in two sentences.") into the system text of processed rows.

    python scripts/style_prompt.py --style concise             presets: concise, json, step-by-step, structured
    python scripts/style_prompt.py --style "Use British spelling." --mode append --in a.jsonl --out b.jsonl

Without --in and --out it reads every split of data/processed and writes data/processed_with_style, which training then
uses by default, with source.json, the record of its source.
"""

from __future__ import annotations

import argparse
from typing import Any

from sft import console

MODES = ("replace", "prepend", "append", "fill")


def build_parser() -> argparse.ArgumentParser:
    parser = console.parser(__doc__)
    add = parser.add_argument
    add("--style", metavar="TEXT", help="a sentence of your own, or a preset's name")
    add("--mode", choices=MODES, default="replace", help="what happens to an existing system text")
    add("--in", dest="source", metavar="F", help="one file of rows (default: every processed split)")
    add("--out", dest="target", metavar="F", help="file for the styled rows; needed with --in")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from sft.data import style
    from sft.errors import DataError

    if not args.style:
        presets = "\n".join(f"    {name}: {text}" for name, text in style.PRESETS.items())
        fix = f'make style STYLE="a sentence of your own", or one of the presets:\n{presets}'
        raise DataError("--style is missing", fix=fix)
    if bool(args.source) != bool(args.target):
        raise DataError("--in and --out go together", fix="give both, or neither to style every processed split")
    root = console.project_root()
    data = console.load_config(args).config.data
    text = style.style_text(args.style)
    if args.source:
        counts = {args.target: style.style_file(Path(args.source), Path(args.target), text, args.mode)}
    else:
        counts = style.style_folder(data, root, text, args.mode)
    console.say(f"style ({args.mode}): {text}")
    console.table("Rows styled", ("", "rows"), [(name, f"{count:,}") for name, count in counts.items()])
    if not args.source:
        console.say(f"written to {data.styled_dir}; make train uses these rows, unless data.stage names others")
    return {"style": text, "mode": args.mode, "rows": counts}


if __name__ == "__main__":
    console.run(build_parser(), main)
