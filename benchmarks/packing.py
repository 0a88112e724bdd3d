"""The share of computed tokens that are real: packed, and in groups of similar length.

    python benchmarks/packing.py [--data alpaca.json --tokenizer tokenizer.json] [--budget 2048] [--json]

Counted on the micro-batches that training computes, over one epoch of steps. "Computed" is every position of the tensor
that goes through the model. Packed rows have no padding at all, because attention gets each row's own boundaries
(varlen on a GPU, row by row on a CPU). So the table also shows how full the token budget is, which fixed-length packing
pads to.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def measure(rows: list[dict[str, Any]], *, budget: int, effective: int, packed: bool) -> dict[str, Any]:
    """Real tokens over computed ones, and over the token budgets used, in one epoch."""
    from sft.step.batch import Collator, split_micro_batches
    from sft.training.loop import step_batches

    real = computed = micros = fullest = 0
    for indices in step_batches(len(rows), effective, 42, 0):
        batch = Collator("causal")([dict(rows[index]) for index in indices])
        parts = split_micro_batches(batch, tokens=budget, packed=packed)
        real += int(batch["lengths"].sum())
        computed += sum(micro.computed for micro in parts)
        micros += len(parts)
        fullest += min(len(parts), -(-int(batch["lengths"].sum()) // budget))
    return {
        "rows": "packed" if packed else "groups of like length",
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
    on_disk = data.exists() and tokenizer.exists()
    if on_disk:
        rows = material.alpaca(data, tokenizer, longest=args.budget, most=args.most)
    else:
        rows = material.generated_rows(4000, longest=args.budget, vocabulary=1000)
    tokens = sum(len(row["input_ids"]) for row in rows)
    results = [
        measure(rows, budget=args.budget, effective=effective, packed=packed)
        for effective in (16, 64, 256)
        for packed in (True, False)
    ]
    source = {
        "rows_from": data.name if on_disk else "generated",
        "rows": len(rows),
        "tokens": tokens,
        "budget": args.budget,
    }
    if args.json:
        print(json.dumps({**source, "cuts": results}, indent=1))
        return
    print(f"{source['rows_from']}: {len(rows):,} rows, {tokens:,} tokens, {args.budget} tokens a micro-batch\n")
    keys = list(results[0])
    print(
        "\n".join(
            material.table([key.replace("_", " ") for key in keys], [[result[k] for k in keys] for result in results])
        )
    )


if __name__ == "__main__":
    main()
