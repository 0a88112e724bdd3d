"""One step on the CPU: the window against plain transformers (length groups, 4 x 4 accumulation), in turn.

    python benchmarks/step_cpu.py --rows alpaca.json --tokenizer qwen2.5/tokenizer.json [--rounds 7]

Real tokens/s (padding not counted), medians over interleaved rounds of the same rows. The plain side is a bare loop, no
Trainer around it, which flatters it. Model: Qwen2 of 4 layers, hidden 256, feed-forward 1024, 32k vocabulary, random
weights, fp32, LoRA r 16 on all linears, no checkpointing, AdamW, 16 rows a step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2ForCausalLM

from sft.step import attention
from sft.step.microbatch import backward_window
from sft.step.window import Collator

VOCABULARY, STEP_ROWS, MICRO_ROWS = 32_000, 16, 4


def read(path: Path, tokenizer: Path, longest: int) -> list[dict[str, Any]]:
    tok = Tokenizer.from_file(str(tokenizer))
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        prompt = tok.encode(f"{row['instruction']}\n{row.get('input', '')}\n").ids
        ids = [token % VOCABULARY for token in prompt + tok.encode(row["output"]).ids][:longest]
        rows.append({"input_ids": ids, "labels": [-100] * min(len(prompt), len(ids)) + ids[len(prompt) :]})
    return rows


def model(attn: str) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        attn_implementation=attn,
    )
    return get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=16, target_modules="all-linear")).train()


def plain(made: Any, rows: list[dict[str, Any]]) -> float:
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    total = 0.0
    for start in range(0, len(rows), MICRO_ROWS):
        part = rows[start : start + MICRO_ROWS]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in part], True, 0)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in part], True, -100)
        mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in part], True, 0)
        loss = made(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
    return total


def windowed(made: Any, rows: list[dict[str, Any]]) -> float:
    return float(backward_window(made, Collator("causal")(rows), tokens=2048))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of 16 rows in a round")
    parser.add_argument("--longest", type=int, default=512)
    args = parser.parse_args()
    attention.register()
    rows = read(args.rows, args.tokenizer, args.longest)
    random.Random(0).shuffle(rows)
    rows = rows[: STEP_ROWS * args.steps]
    tokens = sum(len(row["input_ids"]) for row in rows)
    labelled = sum(label != -100 for row in rows for label in row["labels"]) / tokens
    sides = {"plain": (model("sdpa"), plain), "window": (model(attention.NAME), windowed)}
    optimizers = {
        name: torch.optim.AdamW(p for p in made.parameters() if p.requires_grad) for name, (made, _) in sides.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):  # the first round warms up
        for name, (made, run) in sides.items():
            started = time.perf_counter()
            for start in range(0, len(rows), STEP_ROWS):
                losses[name].append(run(made, rows[start : start + STEP_ROWS]))
                optimizers[name].step()
                made.zero_grad(set_to_none=True)
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - started))
    middle = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    apart = max(abs(a - b) for a, b in zip(losses["plain"], losses["window"], strict=True))
    print(
        json.dumps(
            {
                "real_tokens_per_second": middle,
                "ratio": round(middle["window"] / middle["plain"], 3),
                "labelled": round(labelled, 3),
                "largest_loss_difference": apart,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "rounds": args.rounds,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
