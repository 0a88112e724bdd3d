"""Writes a page about the training rows: lengths in tokens, what is cut, what repeats, what was left out.

    python scripts/report_data.py                          the config's rows -> outputs/reports/data.html
    python scripts/report_data.py --set model.max_seq_len=1024 --limit 0 --out data.html
    python scripts/report_data.py --json > figures.json

Reads processed rows, ledger.json and quarantine.jsonl; loads the tokenizer and no model; changes no row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft import console

LIMIT = 10_000


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__)
    flags.add_argument(
        "--limit", type=int, default=LIMIT, metavar="N", help=f"rows to tokenise (0: all; default {LIMIT:,})"
    )
    flags.add_argument("--out", type=Path, metavar="FILE", help="the page (default: outputs/reports/data.html)")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Read the rows and their ledger, tokenise a sample, write the page."""
    from sft.config.load import display_path, resolve_path
    from sft.data import store
    from sft.files import write_text
    from sft.report import data_report

    root = console.project_root()
    config = console.load_config(args).config
    stage = store.resolve_stage(config.data, root)
    result, rows = data_report.figures(config, stage, resolve_path(root, config.data.processed_dir), max(0, args.limit))
    result["tokens"] = in_tokens(config, root, rows)
    out = args.out or root / "outputs" / "reports" / "data.html"
    write_text(out, data_report.page(result, f"Data report: {config.experiment.name or stage.train.parent.name}"))
    console.say(result["verdict"])
    if len(rows) < result["sample"]["of"]:
        console.say(f"token figures come from {len(rows):,} of {result['sample']['of']:,} rows (--limit 0: all)")
    console.say(f"written to {display_path(out.resolve(), root)}")
    for name in ("sizes", "shares"):
        (result["tokens"] or {}).pop(name, None)
    return {**result, "page": str(out)}


def in_tokens(config: Any, root: Path, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The figures that need a tokenizer; None, with a warning, where the model is not available."""
    from sft.errors import ModelError
    from sft.generation.encoder import load_encoder
    from sft.report import data_report

    try:
        encoder = load_encoder(config, root)
    except ModelError as error:
        console.warn(f"the page has no token figures, because there is no tokenizer: {error}")
        return None
    with console.progress("tokenising") as advance:
        return data_report.token_figures(encoder, rows, advance)


if __name__ == "__main__":
    console.run(parser(), main)
