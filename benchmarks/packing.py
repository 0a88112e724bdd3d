"""How much of what a micro-batch computes is real tokens: packed, and in groups of like length.

    python benchmarks/packing.py [--data alpaca.json --tokenizer tokenizer.json] [--budget 2048] [--json]

Counted on the very micro-batches that training cuts, over one epoch of windows. "Computed" is every position of the
tensor that goes through the model. Packed rows carry no padding at all, since attention gets each row's own boundaries
(varlen on a GPU, row by row on a CPU); so beside the share of real tokens stands how full the budget is, which is what
fixed-length packing would pad up to.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def measure(rows: list[dict[str, Any]], *, budget: int, effective: int, apart: bool) -> dict[str, Any]:
    """Real over computed tokens, and over the budgets that were opened, of an epoch's steps."""
    from sft.step.batch import Collator, split_micro_batches
    from sft.training.loop import step_batches

    real = computed = micros = fullest = 0
    for indices in step_batches(len(rows), effective, 42, 0):
        batch = Collator("causal")([dict(rows[index]) for index in indices])
        parts = split_micro_batches(batch, tokens=budget, packed=apart)
        real += int(batch["lengths"].sum())
        computed += sum(micro.computed for micro in parts)
        micros += len(parts)
        fullest += min(len(parts), -(-int(batch["lengths"].sum()) // budget))
    return {
        "rows": "packed" if apart else "groups of like length",
        "rows_a_step": effective,
        "real_of_computed": round(real / computed, 4),
        "real_of_budget": round(real / (micros * budget), 4),
        "micro_batches": micros,
        "fewest_possible": fullest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a micro-batch, and the longest row")
    parser.add_argument("--most", type=int, default=60_000, help="rows")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from benchmarks import material

    data, tokenizer = args.data or material.ALPACA, args.tokenizer or material.TOKENIZER
    there = data.exists() and tokenizer.exists()
    if there:
        rows = material.alpaca(data, tokenizer, longest=args.budget, most=args.most)
    else:
        rows = material.made(4000, longest=args.budget, vocabulary=1000)
    tokens = sum(len(row["input_ids"]) for row in rows)
    found = [
        measure(rows, budget=args.budget, effective=effective, packed=apart)
        for effective in (16, 64, 256)
        for apart in (True, False)
    ]
    source = {"rows_from": data.name if there else "made", "rows": len(rows), "tokens": tokens, "budget": args.budget}
    if args.json:
        print(json.dumps({**source, "cuts": found}, indent=1))
        return
    print(f"{source['rows_from']}: {len(rows):,} rows, {tokens:,} tokens, {args.budget} tokens a micro-batch\n")
    keys = list(found[0])
    print("\n".join(material.table([key.replace("_", " ") for key in keys], [[one[k] for k in keys] for one in found])))


if __name__ == "__main__":
    main()
