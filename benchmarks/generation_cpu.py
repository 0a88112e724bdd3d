"""Answers per second on the CPU: our engine against a loop of one prompt at a time, on the demo model, interleaved.

    python benchmarks/generation_cpu.py [--adapters adapters/demo] [--rounds 5] [--sizes 8,32]

The loop is transformers' own `generate`, greedy, with its KV cache and the template's end tokens; the engine's batch
of one is measured too. Prompts: the first rows of data/samples/support_desk.jsonl through the demo's template.
Medians over interleaved rounds; the texts of both must be equal, or the command fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import torch

from sft.config.load import load
from sft.generation import batch_io
from sft.generation import load as serving
from sft.generation.stop import StopCriteria

Texts = Callable[[], list[str]]


def one_at_a_time(loaded: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    base, stops = loaded.model, loaded.encoder.stops
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            tokens = base.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                eos_token_id=sorted(stops.ids), pad_token_id=loaded.pad_id(),
            )  # fmt: skip
        texts.append(StopCriteria(loaded.tokenizer, stops).answer(tokens[0, len(prompt) :].tolist()).text)
    return texts


def measure(variants: dict[str, Texts], rounds: int) -> dict[str, float]:
    """Seconds of each variant: the median over rounds in which they take turns."""
    texts = {name: variant() for name, variant in variants.items()}  # warm-up; all texts must be equal
    if len({tuple(answers) for answers in texts.values()}) != 1:
        raise SystemExit("the texts differ: nothing to compare")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, help="an adapter of the demo model (default: the demo model itself)")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="8,32", help="answers side by side")
    args = parser.parse_args()
    config = load(ROOT / "configs" / "demo_cpu.yaml", root=ROOT).config
    loaded = serving.open_model(config, adapter=args.adapters and args.adapters.resolve(), root=ROOT)
    requests = batch_io.read(ROOT / "data" / "samples" / "support_desk.jsonl", None)[: args.rows]
    prompts = [loaded.encoder.prompt(request.row) for request in requests if request.row is not None]

    def batched(size: int) -> list[str]:
        return [answer.text for answer in loaded.generate(prompts, config.generation, size)]

    variants: dict[str, Texts] = {"loop": lambda: one_at_a_time(loaded, prompts, config.generation.max_new_tokens)}
    variants |= {f"engine, {size}": lambda size=size: batched(size) for size in (1, *map(int, args.sizes.split(",")))}
    seconds = measure(variants, args.rounds)
    for name, median in seconds.items():
        answers = len(prompts) / median
        print(f"{name:12} {answers:8.1f} answers/s   {seconds['loop'] / median:5.2f} x")
    print(json.dumps({"rows": len(prompts), "threads": torch.get_num_threads(), "seconds": seconds}))


if __name__ == "__main__":
    main()
