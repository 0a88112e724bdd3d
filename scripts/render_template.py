"""Writes rows as the chat template renders them: {"id", "input", "target"}, for other trainers or for inspection.

    python scripts/render_template.py                             data/rendered/{train,val,test}.jsonl
    python scripts/render_template.py --set data.template_path=alpaca --in rows.jsonl --out rendered.jsonl

Reads processed (or styled) rows. `input` is the prompt, `target` the last answer without the end token.
Training takes these rows only where `data.stage` is `rendered`, and then gives the same tokens as the rows themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__)
    add = result.add_argument
    add("--in", dest="source", metavar="FILE", help="one file of rows (default: every split)")
    add("--out", dest="target", metavar="FILE", help="file for the rendered rows; needed with --in")
    add("--tokenizer", metavar="DIR", help="a folder of tokenizer files instead of model.name")
    add("--template", metavar="NAME|FILE", help="a chat template instead of data.template_path")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Load the encoder, render one file or every split, report the rows that were refused."""
    from sft.config.load import resolve_path
    from sft.data import store
    from sft.errors import DataError
    from sft.generation.encoder import load_named_encoder

    if bool(args.source) != bool(args.target):
        raise DataError("--in and --out go together", fix="give both, or neither to render every split")
    root = console.project_root()
    config = console.load_config(args).config
    encoder = load_named_encoder(config, root, tokenizer=args.tokenizer, template=args.template)
    if args.source:
        pairs = {args.target: (Path(args.source), Path(args.target))}
    else:
        stage = "auto" if config.data.stage == "rendered" else config.data.stage
        splits = store.resolve_stage(config.data.model_copy(update={"stage": stage}), root).paths
        folder = resolve_path(root, config.data.rendered_dir)
        pairs = {name: (path, folder / f"{name}.jsonl") for name, path in splits.items()}
    results = {name: render(encoder, source, target) for name, (source, target) in pairs.items()}
    console.say(f"template: {encoder.template.name}")
    table = [(name, result["rows"], len(result["refused"])) for name, result in results.items()]
    console.table("Rows rendered", ("", "rows", "left out"), table)
    for name, result in results.items():
        for row, reason in list(result["refused"].items())[:3]:
            console.warn(f"{name}: row {row}: {reason}")
    return results


def render(encoder: Any, source: Path, target: Path) -> dict[str, Any]:
    """Rows written, and the rows that the template or the label derivation refuses, with the reason."""
    import json

    from sft.chat.template import Refused
    from sft.data import rows as records
    from sft.data import store
    from sft.errors import DataError
    from sft.files import atomic_file

    rows, refused = 0, {}
    with atomic_file(target) as staged, staged.open("w", encoding="utf-8", newline="\n") as file:
        for row in store.iter_rows(source):
            try:
                if records.is_pair(row):
                    raise Refused("a preference pair has two answers, and a rendered row has one")
                rendered = row if records.is_rendered(row) else {"id": records.row_id(row), **encoder.split(row)}
                if (field := encoder.weight_field) and field in row:
                    rendered[field] = row[field]
            except Refused as refusal:
                refused[records.row_id(row)] = str(refusal)
                continue
            file.write(json.dumps(rendered, ensure_ascii=False) + "\n")
            rows += 1
        if not rows:
            raise DataError("no row can be rendered", where=str(source), fix=next(iter(refused.values()), None))
    return {"rows": rows, "refused": refused}


if __name__ == "__main__":
    console.run(parser(), main)
