"""Processes raw rows: reads any format, checks and splits the rows, and accounts for every one.

    python scripts/process_data.py                             data/raw/raw.jsonl, else raw.json
    python scripts/process_data.py --raw_path my_rows.csv --set data.columns.user=Question \\
                                   --set data.columns.assistant="Best Answer"
    python scripts/process_data.py --raw_path owner/name --set data.hub_split=train

Reads JSON, JSONL, CSV, TSV or Parquet, compressed or not, a folder of them, a hub data set, or several (data.sources).
Writes data/processed/{train,val,test}.jsonl, ledger.json and quarantine.jsonl. With more faults than data.max_dropped
it changes nothing and writes rejected.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import console

if TYPE_CHECKING:
    from sft.data.ledger import Ledger

FORMATS = ("auto", "chat", "qa", "prompt", "alpaca", "sharegpt", "messages", "rendered", "text", "columns")


def build_parser() -> argparse.ArgumentParser:
    parser = console.parser(__doc__)
    parser.add_argument("--raw_path", metavar="P", help="file, or hub data set as owner/name (default: data.raw_path)")
    parser.add_argument("--format", choices=FORMATS, help="format of the rows (default: data.format, which is auto)")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft.config.load import load
    from sft.data.process import Rejected, process

    root = console.project_root()
    sets = [*args.set, *([f"data.format={args.format}"] if args.format else [])]
    data = load(args.config, sets, root=root).config.data
    if "/" in (raw := args.raw_path or data.raw_path or "") and not Path(raw).exists() and not (root / raw).exists():
        from sft.model.hub import install_token

        install_token(root)  # a hub data set may be gated
    try:
        with console.progress("reading rows") as on_progress:
            ledger = process(data, root, args.raw_path, on_progress)
    except Rejected as rejected:
        show(rejected.ledger)
        raise
    show(ledger)
    console.say(f"written to {data.processed_dir}; next: make preview, make train")
    return ledger.to_json()


def show(ledger: Ledger) -> None:
    """Shows the formats, one example, and the account of the rows."""
    import json

    for line in ledger.warnings:
        console.warn(line)
    formats = ", ".join(f"{name} ({count:,})" for name, count in ledger.formats.items()) or "no usable row"
    console.say(f"{ledger.source}: {ledger.kind}, {ledger.encoding}; formats: {formats}")
    if ledger.example:
        text = json.dumps(ledger.example, ensure_ascii=False)
        console.say(f"the first row became: {text if len(text) < 400 else text[:400] + ' ...'}")
    named = {f"  {reason}": count for reason, count in ledger.named.items()}
    splits = {f"  {name}": count for name, count in ledger.splits.items() if ledger.accepted}
    again = {"  of which copies by weight": ledger.repeated, "  of them replay": ledger.replayed}
    more = {name: count for name, count in again.items() if count}
    counts = {
        "rows read": ledger.read,
        **more,
        **named,
        "rows written" if ledger.accepted else "rows left": ledger.written,
        **splits,
    }
    console.table("What became of the rows", ("", "rows"), [(name, f"{count:,}") for name, count in counts.items()])
    for reason, examples in ledger.examples.items():
        console.say(f"{reason}, for example: {examples[0]['origin']}: {examples[0]['detail']}")
    if not ledger.accepted:  # the error says the rest
        return
    for line in ledger.report_lines():
        console.say(line)
    share = f"{ledger.fault_share:.1%} faulty, {ledger.max_dropped:.0%} allowed"
    console.say(f"{share}; {ledger.verdict()}")


if __name__ == "__main__":
    console.run(build_parser(), main)
