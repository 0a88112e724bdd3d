"""Processes raw rows: reads any format, checks and splits the rows, and accounts for every one.

    python scripts/process_data.py                             data/raw/raw.jsonl, else raw.json
    python scripts/process_data.py --raw_path my_rows.csv --user_col Question --answer_col "Best Answer"
    python scripts/process_data.py --raw_path owner/name --set data.hub_split=train

Reads JSON, JSONL, CSV, TSV or Parquet, compressed or not, a folder of them, a hub data set, or several (data.sources).
Writes data/processed/{train,val,test}.jsonl, ledger.json and quarantine.jsonl. With more faults than data.max_dropped
it changes nothing and writes rejected.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import console

if TYPE_CHECKING:
    from sft.config.load import Loaded
    from sft.config.schema import DataSection
    from sft.data.ledger import Ledger

FORMATS = (
    "auto", "chat", "qa", "prompt", "alpaca", "sharegpt", "messages", "openassistant", "rendered", "text", "columns"
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = console.parser(__doc__)
    parser.add_argument("--raw_path", metavar="P", help="file, or hub data set as owner/name (default: data.raw_path)")
    parser.add_argument("--format", choices=FORMATS, help="format of the rows (default: data.format, which is auto)")
    parser.add_argument("--user_col", metavar="NAME", help="column of a table that holds the questions")
    parser.add_argument("--answer_col", metavar="NAME", help="column that holds the answers (default: data.columns)")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft.data.process import Rejected, process

    root = console.project_root()
    args.set += [f"data.format={args.format}"] if args.format else []
    loaded = console.load_config(args)
    data = loaded.config.data
    if args.user_col or args.answer_col:
        data = with_columns(data, args.user_col, args.answer_col)
    if "/" in (raw := args.raw_path or data.raw_path or "") and not Path(raw).exists() and not (root / raw).exists():
        from sft.model.hub import install_token

        install_token(root)  # a hub data set may be gated
    while True:
        try:
            with console.progress("reading rows") as on_progress:
                ledger = process(data, root, args.raw_path, on_progress, rated=loaded.config.train.objective == "kto")
            break
        except Rejected as rejected:
            show(rejected.ledger)
            if rejected.table is None or args.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise
            try:
                data = with_columns(data, *ask_columns(rejected.table))
            except EOFError:
                raise rejected from None
    show(ledger)
    own = args.raw_path is None or Path(args.raw_path).resolve() == (root / (data.raw_path or "-")).resolve()
    if own and data.columns != loaded.config.data.columns:
        save_columns(root, loaded, data)
    console.say(f"written to {data.processed_dir}; next: make preview, make train")
    return ledger.to_json()


def with_columns(data: DataSection, user: str | None, assistant: str | None) -> DataSection:
    """The settings with this mapping of columns."""
    set_before = dict(data.columns) if data.columns else {}
    columns = {**set_before, **({"user": user} if user else {}), **({"assistant": assistant} if assistant else {})}
    return type(data).model_validate({**data.model_dump(), "columns": columns})


def save_columns(root: Path, loaded: Loaded, data: DataSection) -> None:
    """Writes the columns into configs/local.yaml, below its `raw_path`, so that the quick start too uses them."""
    import json

    from sft import files

    place = loaded.origin("data.columns") or loaded.origin("data.raw_path") or ""
    if data.columns is None or not place.startswith(f"{console.LOCAL_CONFIG}:"):
        return
    path, at = root / console.LOCAL_CONFIG, int(place.rpartition(":")[2]) - 1
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    columns = {key: value for key, value in data.columns.model_dump().items() if value}
    line = f"{indent}columns: {json.dumps(columns, ensure_ascii=False)}\n"
    if loaded.is_set("data.columns"):
        if not lines[at].lstrip().startswith("columns: {"):  # written by hand over several lines
            return
        lines[at] = line
    else:
        lines[at] = lines[at].rstrip() + "\n" + line
    files.write_text(path, "".join(lines))
    console.say(f"data.columns is saved in {console.LOCAL_CONFIG}")


def ask_columns(row: dict[str, Any]) -> tuple[str, str]:
    """Asks which columns of a table hold question and answer, with a guess; prints the command that needs no asking."""
    import shlex

    from sft.data.formats import guess_columns

    names, answers = list(row), list[str]()
    console.say("\nNo format has these columns. Which of them is trained on?")
    for number, name in enumerate(names, 1):
        console.say(f"  {number}. {name}: {str(row[name])[:60]!r}")
    for what, guess in zip(("question", "answer"), guess_columns(row) or names, strict=False):
        while len(answers) < 1 + (what == "answer"):
            text = input(f"column of the {what} [1-{len(names)}, Enter for {guess}] ").strip() or guess
            name = names[int(text) - 1] if text.isdigit() and 1 <= int(text) <= len(names) else text
            if name in names:
                answers.append(name)
    user, answer = answers
    console.say(f"\nto give this without being asked: USER_COL={shlex.quote(user)} ANSWER_COL={shlex.quote(answer)}\n")
    return user, answer


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
    if ledger.written:
        within = ledger.fault_share <= ledger.max_dropped
        limit = f"{ledger.max_dropped:.0%} allowed" if within else "so few are accepted in any file"
        share = f"{ledger.fault_share:.1%} faulty, {limit}"
        console.say(f"{share}; {ledger.verdict()}")


if __name__ == "__main__":
    console.run(build_parser(), main)
