"""Shows rows as the model is trained on them: coloured tokens on the terminal, an HTML page, or a JSON line a row.

    python scripts/preview.py --split val --limit 3            rows of the config
    python scripts/preview.py --in rows.jsonl --limit 0 --json > tokens.jsonl
    python scripts/preview.py --in rows.jsonl --id 3f2a --tokenizer DIR --template llama3 --html preview.html

Reads rows, config and tokenizer; loads no model. Rows are shown as they are, not cleaned.
"""

from __future__ import annotations

import argparse
import copy
from itertools import islice
from pathlib import Path
from typing import Any

from sft import console

DEFAULT_LIMIT = 6
FIRST_ROWS = 100_000  # of which some are chosen


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__)
    add = result.add_argument
    add("--in", dest="rows", metavar="FILE", help="rows to show (default: the config's)")
    add("--split", choices=["train", "val", "test"], default="train", help="which split of the config")
    add(
        "--limit",
        type=int,
        metavar="N",
        help=f"how many of the first 100,000 rows, 0 for all (default {DEFAULT_LIMIT}; --json: all)",
    )
    add("--id", metavar="ID", help="the row whose id begins with this")
    add("--html", metavar="FILE", help="write a page instead of the terminal")
    add("--tokenizer", metavar="DIR", help="a folder of tokenizer files instead of model.name")
    add("--template", metavar="NAME|FILE", help="a chat template instead of data.template_path")
    add("--seed", type=int, default=0, help="seed of the random rows")
    add("--tokens", action="store_true", help="with --json: also the text and state of each token")
    return result


def main(args: argparse.Namespace) -> None:
    """Load the encoder and the rows, choose some, show them."""
    from sft.chat import preview
    from sft.data import shards, store
    from sft.files import write_text
    from sft.generation.encoder import load_named_encoder

    root = console.project_root()
    config = console.load_config(args).config
    encoder = load_named_encoder(config, root, tokenizer=args.tokenizer, template=args.template)
    path = Path(args.rows) if args.rows else rows_of_split(config.data, root, args.split)
    if shards.has_tokens(path):
        shown = tokens_of(encoder, path, args)
    else:
        some = None if args.id or args.json or args.limit == 0 else FIRST_ROWS
        rows = choose_rows(list(islice(store.iter_rows(path), some)), path, args)
        encoder, rows = sides(encoder, rows)
        if args.json and not args.tokens:
            print_json(encoder, rows)
            return
        shown = [pair for row in rows for pair in encode(encoder, row)]
    if args.json:
        for piece, tokens in shown:
            print_piece(piece, tokens if args.tokens else None)
        return
    if args.html:
        write_text(args.html, preview.page(f"{path.name}, {encoder.template.name}", shown))
        console.say(f"{len(shown):,} rows written to {args.html}")
        return
    marks = console.out().color_system is None or console.out().no_color  # a pipe, a file, NO_COLOR
    legend = "in the loss: ⟦...⟧, cut: ⟪...⟫" if marks else "in the loss: green, not: grey, cut: struck through"
    console.say(f"template: {encoder.template.name}; {legend}")
    for row, tokens in shown:
        console.out().print(preview.headline(row), style="bold red" if row.dropped else "bold")
        console.out().print(preview.coloured(tokens, marks=marks))


def rows_of_split(data: Any, root: Path, split: str) -> Path:
    """The config's rows of one split. Raises DataError if there are none."""
    from sft.data import store
    from sft.errors import DataError

    path = store.resolve_stage(data, root).paths.get(split)
    if path is None:
        raise DataError(f"there are no {split} rows", where=f"data.{split}_path", fix="make process")
    return path


def tokens_of(encoder: Any, path: Path, args: argparse.Namespace) -> list[tuple[Any, Any]]:
    """The first rows, or the one that --id names, of rows that come as tokens."""
    from sft.chat import pretokenised, preview

    pieces = (one for one in pretokenised.encoded(path, encoder) if one.id.startswith(args.id or ""))
    limit = args.limit if args.limit is not None else None if args.json else DEFAULT_LIMIT
    return [(one, preview.tokens(encoder, one, one)) for one in islice(pieces, limit or None)]


def choose_rows(rows: list[dict[str, Any]], path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that --id and --limit name. Raises DataError if no id fits."""
    from sft.chat import preview
    from sft.data import rows as records
    from sft.errors import DataError

    if args.id:
        rows = [row for row in rows if str(row["id"]).startswith(args.id)]
        if not rows:
            fix = f"--limit 0 shows every row with its id: python scripts/preview.py --in {path} --limit 0"
            raise DataError(f"no row's id begins with {args.id}", where=str(path), fix=fix)
    limit = args.limit if args.limit is not None else 0 if args.json else DEFAULT_LIMIT
    turns = [[row["input"], row["target"]] if records.is_rendered(row) else records.messages(row) for row in rows]
    lengths = [len(str(one)) for one in turns]  # good enough to order rows by, without tokenising them all
    return [rows[index] for index in preview.choose(lengths, limit, args.seed)]


def sides(encoder: Any, rows: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """Where pairs are trained on: their two sides as rows, called by their side, and an encoder for them."""
    if not (encoder.pairs or encoder.rated):
        return encoder, rows
    plain = copy.copy(encoder)
    plain.pairs = plain.rated = False
    named = [
        {**side, "id": f"{side['id']} {name}"}
        for row in rows
        for name, side in (
            zip(("chosen", "rejected"), encoder.sides(row), strict=True)
            if "rejected" in row or encoder.pairs
            else [("good" if row.get("label") else "bad", {key: row[key] for key in row if key != "label"})]
        )
    ]
    return plain, named


def encode(encoder: Any, row: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What a row is trained on as, with its tokens and those that are cut."""
    from sft.chat import preview

    whole = copy.copy(encoder)
    whole.max_seq_len = 10**9
    (pieces,) = encoder.encode_pieces([row])
    return [(one, preview.tokens(encoder, one, whole.encode(row) if len(pieces) == 1 else one)) for one in pieces]


def print_json(encoder: Any, rows: list[dict[str, Any]]) -> None:
    """A JSON line a row; under `split_turns` one for each piece."""
    from sft.chat.dataset import BATCH

    for start in range(0, len(rows), BATCH):
        for pieces in encoder.encode_pieces(rows[start : start + BATCH]):
            for piece in pieces:
                print_piece(piece)


def print_piece(piece: Any, tokens: Any = None) -> None:
    keys = ["id", "text", "input_ids", "labels", "truncated_tokens", "dropped"]
    keys += ["weights"] if piece.weights else []
    more = {} if tokens is None else {"tokens": [[token.text, token.state] for token in tokens]}
    console.emit({key: getattr(piece, key) for key in keys} | more)


if __name__ == "__main__":
    console.run(parser(), main)
