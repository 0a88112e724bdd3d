"""Operations of one training step, counted while it runs, against the formula of the mode that ran.

    python benchmarks/flops.py [--json]

The formulas and how causal attention is counted: scripts/sft/step/flops.py. The model is `step_cpu.py`'s, shrunk in its
vocabulary with --tiny; rows are Alpaca's where it is at hand, else made of the same spread of lengths. Counts do not
depend on the machine. Every mode: frozen base with LoRA, full; with and without checkpointing; packed and padded.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

MODES = [(frozen, again, apart) for frozen in (True, False) for again in (False, True) for apart in (True, False)]


def measure(
    rows: list[dict[str, Any]], shapes: dict[str, Any], *, tokens: int, modes: list[tuple[bool, bool, bool]] = MODES
) -> list[dict[str, Any]]:
    """One step of these rows in each mode (frozen base, checkpointing, packed): operations a computed token."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sft.step import attention, flops
    from sft.step.batch import Collator, split_micro_batches
    from sft.step.step import StepConfig, forward_backward

    attention.register()
    batch, found = Collator("causal")([dict(row) for row in rows]), []
    for frozen, again, apart in modes:
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shapes, attn_implementation=attention.NAME if apart else "sdpa"))
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if frozen:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        model.train()
        micros = [micro for micro in split_micro_batches(batch, tokens=tokens, packed=apart) if micro.labelled]
        done, of_attention = flops.counted(
            partial(forward_backward, model, batch, StepConfig(micro_batch_tokens=tokens, packed=apart))
        )
        computed = sum(micro.computed for micro in micros)
        lengths = batch["lengths"].tolist() if apart else [m.targets.shape[1] for m in micros for _ in m.rows]
        labelled = sum(micro.labelled for micro in micros) / computed
        wanted = flops.a_token(flops.shape_of(model), lengths, labelled, frozen=frozen, checkpointing=again)
        found.append(
            {
                "mode": f"{'LoRA' if frozen else 'full'}, {'checkpointing' if again else 'no checkpointing'}",
                "rows": "packed" if apart else "padded",
                "computed_tokens": computed,
                "counted_mflop_a_token": round(done / computed / 1e6, 3),
                "formula_mflop_a_token": round(wanted / 1e6, 3),
                "ratio": round(done / computed / wanted, 4),
                "attention_share": round(of_attention / done, 4),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--tiny", action="store_true", help="a vocabulary of 2k and 8 rows, to try it out")
    args = parser.parse_args()
    from benchmarks import material, step_cpu

    shapes = {**step_cpu.SHAPES, **({"vocab_size": 2000} if args.tiny else {})}
    sizes = {"longest": 512, "vocabulary": shapes["vocab_size"]}
    there = material.ALPACA.exists()
    rows = material.alpaca(material.ALPACA, material.TOKENIZER, **sizes) if there else material.made(64, **sizes)
    found = measure(rows[: 8 if args.tiny else 16], shapes, tokens=args.tokens)
    if args.json:
        print(json.dumps({"rows_from": "Alpaca" if there else "made", "modes": found}, indent=1))
        return
    keys = list(found[0])
    print("\n".join(material.table([key.replace("_", " ") for key in keys], [[one[k] for k in keys] for one in found])))
    print(f"\nhighest ratio {max(one['ratio'] for one in found):.3f} (rows: {'Alpaca' if there else 'made'})")


if __name__ == "__main__":
    main()
