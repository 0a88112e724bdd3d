"""Shows rows as the model is trained on them: coloured tokens on the terminal, an HTML page, or a JSON line a row.

    python scripts/preview.py                                  # some training rows of the config
    python scripts/preview.py --in rows.jsonl --id 3f2a --html preview.html

Reads rows, config and tokenizer; loads no model. Rows are shown as they stand, not cleaned.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from sft import console

EXAMPLES = """
python scripts/preview.py --split val --limit 3
python scripts/preview.py --in rows.jsonl --limit 0 --json > tokens.jsonl
python scripts/preview.py --in rows.jsonl --tokenizer path/to/tokenizer --template llama3 --html preview.html
"""
SHOWN = 6


def parser() -> argparse.ArgumentParser:
    made = console.parser("Show rows token by token: what is learnt, what is masked, what is cut.", EXAMPLES)
    made.add_argument("--in", dest="rows", metavar="FILE", help="rows to show (default: the config's)")
    made.add_argument("--split", choices=["train", "val", "test"], default="train", help="which of the config's rows")
    made.add_argument("--limit", type=int, metavar="N", help=f"how many rows, 0 for all (default {SHOWN}; --json: all)")
    made.add_argument("--id", metavar="ID", help="the row whose id begins so")
    made.add_argument("--html", metavar="FILE", help="write a page instead of the terminal")
    made.add_argument("--tokenizer", metavar="DIR", help="a folder of tokenizer files instead of model.name")
    made.add_argument("--template", metavar="NAME|FILE", help="a chat template instead of data.template_path")
    made.add_argument("--seed", type=int, default=0, help="which random rows")
    return made


def main(args: argparse.Namespace) -> None:
    from sft.chat import preview
    from sft.config.load import load
    from sft.data import store
    from sft.errors import DataError
    from sft.files import write_text
    from sft.preflight.encoder import encoder_of, row_file

    root = console.project_root()
    config = load(args.config, args.set, root=root).config
    encoder = encoder_of(config, root, tokenizer=args.tokenizer, template=args.template)
    path = Path(args.rows) if args.rows else row_file(config.data, root, args.split)
    rows = store.read_rows(path)
    if args.id:
        rows = [row for row in rows if str(row["id"]).startswith(args.id)]
        if not rows:
            raise DataError(f"no row's id begins with {args.id}", where=str(path))
    limit = args.limit if args.limit is not None else 0 if args.json else SHOWN
    rows = [rows[index] for index in preview.choose([_length(row) for row in rows], limit, args.seed)]
    if args.json:
        _lines(encoder, rows)
        return
    whole = copy.copy(encoder)
    whole.max_seq_len = 10**9
    shown = [pair for row in rows for pair in _shown(encoder, whole, row)]
    if args.html:
        write_text(args.html, preview.page(f"{path.name}, {encoder.template.name}", shown))
        console.say(f"{len(shown):,} rows written to {args.html}")
        return
    console.say(f"template: {encoder.template.name}; learnt: green, read only: grey, cut: struck through")
    for made, tokens in shown:
        console.out().print(preview.headline(made), style="bold red" if made.dropped else "bold")
        console.out().print(preview.coloured(tokens))


def _shown(encoder: Any, whole: Any, row: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What a row is trained on as, with its tokens; of a row cut for length those that are gone as well."""
    from sft.chat import preview

    made = encoder.encode_pieces(row)
    return [(one, preview.tokens(encoder, one, whole.encode(row) if len(made) == 1 else one)) for one in made]


def _lines(encoder: Any, rows: list[dict[str, Any]]) -> None:
    """A JSON line a row; under `split_turns` one for each piece."""
    from sft.chat.dataset import BATCH, pieces

    keys = ("id", "text", "input_ids", "labels", "truncated_tokens", "dropped")
    for at in range(0, len(rows), BATCH):
        for made in pieces(encoder, rows[at : at + BATCH]):
            for one in made:
                console.emit({key: getattr(one, key) for key in keys})


def _length(row: dict[str, Any]) -> int:
    """Characters of a row's texts: near enough to order rows by, without tokenising them all."""
    from sft.data import rows as records

    if records.is_rendered(row):
        return len(row["input"]) + len(row["target"])
    return sum(len(str(message.get("content") or "")) for message in records.messages(row))


if __name__ == "__main__":
    console.run(parser(), main)
