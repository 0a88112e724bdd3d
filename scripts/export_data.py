"""Writes the rows as other training programs read them, for a run that outgrows this one (docs/SCALING.md).

    python scripts/export_data.py                           data/exported/trl/{train,val,test}.jsonl
    python scripts/export_data.py --to nemo --out DIR       for NeMo AutoModel's ChatDataset
    python scripts/export_data.py --to torchtitan           for torchtitan's ChatDataset: one question, one answer

trl: `messages` (with `tools`), preference pairs as prompt, chosen and rejected, rated answers as prompt, completion and
label, rendered rows as prompt and completion. The others read `messages` alone. A row that the program cannot read, or
would train on in another way, is left out and named with the reason.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from sft import console

PROGRAMS = ("trl", "nemo", "torchtitan")


def build_parser() -> argparse.ArgumentParser:
    parser = console.parser(__doc__)
    parser.add_argument("--to", choices=PROGRAMS, default="trl", help="the program (default: trl)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: data/exported/PROGRAM")
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    from sft.data import store
    from sft.data.rows import row_id
    from sft.errors import DataError

    root = console.project_root()
    data = console.load_config(args).config.data
    stage = store.resolve_stage(data, root)
    target = args.out or root / "data" / "exported" / args.to
    reasons: Counter[str] = Counter()
    counts: dict[str, int] = {}
    with store.replace_dir(target, {f"{split}.jsonl" for split in store.SPLITS}, "--out") as folder:
        for split, source in stage.paths.items():
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                counts[split] = 0
                for row in store.iter_rows(source):
                    if (reason := refusal(row, args.to, data.weight_field)) is not None:
                        if not reasons[reason]:
                            console.warn(f"{split}: row {row_id(row)} is left out: {reason}")
                        reasons[reason] += 1
                        continue
                    file.write(json.dumps(exported(row), ensure_ascii=False) + "\n")
                    counts[split] += 1
        if not any(counts.values()):
            what = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.items())
            raise DataError(f"{args.to} can read no row ({what})", where=str(stage.train), fix="--to trl")
    console.table(f"rows for {args.to}", ("split", "rows"), [(split, f"{count:,}") for split, count in counts.items()])
    for reason, count in reasons.items():
        console.say(f"{count:,} left out: {reason}")
    console.say(f"written to {target}")
    return {"out": str(target), "rows": counts, "left_out": dict(reasons)}


def refusal(row: dict[str, Any], program: str, weight_field: str | None) -> str | None:
    """Why `program` cannot read this row, or would train on other tokens of it; None if it can."""
    from sft.data import rows

    if weight_field and row.get(weight_field) not in (None, 1):
        return f"its weight (data.weight_field: {weight_field}) would not count"
    if rows.is_rendered(row):
        return None if program == "trl" else "rendered text has no turns"
    turns = rows.messages(row)
    if not rows.is_pair(row) and any(turn.get("weight", 1) != 1 for turn in turns):
        return "the weight of a turn would not count"
    if program != "trl" and (rows.is_pair(row) or "label" in row):
        return "it is not for supervised fine-tuning"
    if program == "torchtitan" and [turn["role"] for turn in turns] != ["user", "assistant"]:
        return "torchtitan reads one question and one answer, without a system text"
    if program == "torchtitan" and (rows.tools(row) or turns[1].keys() - {"role", "content", "weight"}):
        return "torchtitan reads no tools and no reasoning"
    return None


def exported(row: dict[str, Any]) -> dict[str, Any]:
    """The row in the columns that the programs share."""
    from sft.data import rows

    if rows.is_rendered(row):
        return {"prompt": row["input"], "completion": row["target"]}
    shared = {"tools": row["tools"]} if rows.tools(row) else {}
    if rows.is_pair(row):
        prompt = rows.prompt_of_pair(row)
        answers = [plain(side["messages"][len(prompt) :]) for side in rows.sides(row)]
        return {"prompt": plain(prompt), "chosen": answers[0], "rejected": answers[1], **shared}
    turns = plain(rows.messages(row))
    if isinstance(row.get("label"), bool):
        return {"prompt": turns[:-1], "completion": turns[-1:], "label": row["label"], **shared}
    return {"messages": turns, **shared}


def plain(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns without our own keys; tool calls and their results have ids, as NeMo needs them."""
    result: list[dict[str, Any]] = []
    unanswered: list[str] = []
    for stored in turns:
        turn = {key: value for key, value in stored.items() if key != "weight"}
        if calls := turn.get("tool_calls"):
            turn["tool_calls"] = [{"id": f"call_{number}", **call} for number, call in enumerate(calls)]
            unanswered = [call["id"] for call in turn["tool_calls"]]
        if turn["role"] == "tool" and "tool_call_id" not in turn:
            turn["tool_call_id"] = unanswered.pop(0) if unanswered else "call_0"
        result.append(turn)
    return result


if __name__ == "__main__":
    console.run(build_parser(), main)
