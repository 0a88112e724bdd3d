"""One step on the CPU: our trainer against transformers' and TRL's, in interleaved rounds.

    python benchmarks/step_cpu.py                                  # real Alpaca rows, three labelled shares, 7 rounds
    python benchmarks/step_cpu.py --rounds 1 --rows 32 --shares 0.5
    python benchmarks/step_cpu.py --data rows.json --tokenizer tokenizer.json
    python benchmarks/step_cpu.py --model models/smollm2 --rows 32 --rounds 5     # a real model, bf16

With --model each side is a process of its own (memory is its highest resident size), all sides train on the same steps,
and transformers' Trainer takes several cuts: `hf 8x2` is 8 rows a micro-batch, 2 micro-batches a step.

Model: Qwen2 of 4 layers, hidden 256, feed-forward 1024, 8 heads (4 for keys), 32k vocabulary, tied head, random
weights, LoRA r 16 on all linear layers without dropout. fp32, AdamW, no checkpointing, the same threads for all; 16
rows a step, peers in micro-batches of 4. Each side trains all rows once from the same adapter, with its real trainer
around it.

A result is rejected if a gradient norm is zero, if it would need more than 100 % of the measured matmul peak, or if
the loss after the same rows is more than 2 % off the median side's. `hf sorted` is not a real setting: it
is what grouping by length approaches on a large set. A side that is more than three times slower than
the fastest runs in three rounds only. TRL 1.15 forms its loss in Triton, which has no driver for a CPU: it is tried and
listed as not runnable; `hf packed` is its packing with transformers' loss, as TRL's was before. TRL 1.14.2,
the last whose chunked loss is plain torch, runs here:

    pip install --no-deps --target /tmp/trl trl==1.14.2 && PYTHONPATH=/tmp/trl python benchmarks/step_cpu.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 32_000
SHAPES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
PEERS = ["hf dynamic", "hf grouped", "trl default", "trl packing", "hf packed"]
SIDES = ["ours", *PEERS, "hf sorted"]
REAL_PEERS = ["hf 4x4", "hf 8x2", "hf 16x1", "hf 4x4 fp32", "trl 4x4"]
REAL_SIDES = ["ours", *REAL_PEERS]
TARGETS = {0.25: 2.0, 0.5: 1.5, 0.8: 1.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an Alpaca JSON file; default: ../shared, else generated rows")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer.json")
    parser.add_argument("--model", type=Path, help="folder of a real model, with its tokenizer.json")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters, with --model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=80, help="of a set, 16 a step")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=list(TARGETS), help="labelled shares of the row sets"
    )
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, *REAL_SIDES, "ours fp32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="our micro-batch")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results")
    args = parser.parse_args()
    args.sides = args.sides or (REAL_SIDES if args.model else SIDES)
    args.tokenizer = args.tokenizer or (args.model and args.model / "tokenizer.json")
    began = time.monotonic()
    import torch

    torch.set_num_threads(args.threads)
    from benchmarks import material

    rows, source = _rows(args)
    dtype = torch.bfloat16 if args.model else torch.float32
    results: dict[str, Any] = {"machine": material.machine(), "model": _shapes(args), "lora_r": 16, "rows_from": source}
    results["matmul_peak_gflops"] = round(material.matmul_peak("cpu", dtype) / 1e9, 1)
    if args.model:
        args.shares = [material.share(material.with_share(rows, material.share(rows), args.rows))]
    with tempfile.TemporaryDirectory() as folder:
        sides = _sides(args, Path(folder))
        results["sets"] = [
            _set(sides, rows, target_share, args, results["matmul_peak_gflops"]) for target_share in args.shares
        ]
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    lines = _lines(results)
    path = material.save_results("step_cpu_model" if args.model else "step_cpu", results, lines, args.out)
    _plot(results, path.with_suffix(".png"))
    print("\n".join(lines))
    print(f"\n{path} (and .md, .png)")


def _rows(args: Any) -> tuple[list[Any], str]:
    from benchmarks import material

    data, tokenizer = args.data or material.ALPACA, args.tokenizer or material.TOKENIZER
    if data.exists() and tokenizer.exists():
        folded = None if args.model else VOCABULARY
        return material.alpaca(data, tokenizer, longest=args.longest, vocabulary=folded), data.name
    if args.data or args.model:
        sys.exit(f"{data if not data.exists() else tokenizer} does not exist")
    return material.generated_rows(
        2000, longest=args.longest, vocabulary=VOCABULARY
    ), "generated rows: Alpaca was not found (--data)"


def _sides(args: Any, folder: Path) -> list[Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.sides import Settings, Worker, make_sides
    from sft.step import attention

    if args.model:
        settings = Settings(longest=args.longest, folder=folder, dropout=args.dropout)
        return [Worker(name, args.model, settings, args.threads) for name in args.sides]
    attention.register()

    def model(attn: str) -> Any:
        torch.manual_seed(0)
        base = Qwen2ForCausalLM(Qwen2Config(**SHAPES, attn_implementation=attn))
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0)).train()

    return make_sides(model, Settings(longest=args.longest, folder=folder, tokens=args.tokens), args.sides)


def _set(sides: list[Any], rows: list[Any], target_share: float, args: Any, peak: float) -> dict[str, Any]:
    """A warm-up, then interleaved rounds; each round starts with another side."""
    from benchmarks import material

    chosen = material.with_share(rows, target_share, args.rows)
    tokens = sum(len(row["input_ids"]) for row in chosen)
    first, failed = dict[str, Any](), dict[str, str]()
    for side in sides:
        try:
            first[side.name] = side.round(chosen)
        except Exception as error:  # that a peer cannot run here is a result too
            if side.name == "ours":
                raise
            failed[side.name] = f"{type(error).__name__}: {error}"[:200]
    sides = [side for side in sides if side.name in first]
    fastest = min(timed.seconds for timed in first.values())
    timed: dict[str, list[Any]] = {side.name: [] for side in sides}
    for turn in range(args.rounds):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            if turn < 3 or first[side.name].seconds <= 3 * fastest:
                timed[side.name].append(side.round(chosen))
                _log_round(target_share, turn, args.rounds, side.name, tokens / timed[side.name][-1].seconds)
    median_loss = statistics.median(one.loss for rounds in timed.values() for one in rounds)
    work = _work(chosen, material.share(chosen), _shapes(args))
    result = {name: _summary(rounds, tokens, median_loss, work / (peak * 1e9)) for name, rounds in timed.items()}
    valid = {name: one["tokens_per_second"] for name, one in result.items() if not one["thrown_out"]}
    best = max((name for name in [*PEERS, *REAL_PEERS] if name in valid), key=valid.__getitem__, default=None)
    return {
        "labelled": round(material.share(chosen), 3),
        "rows": len(chosen),
        "tokens": tokens,
        "mean_length": round(tokens / len(chosen), 1),
        "sides": result,
        "could_not_run": failed,
        "best_peer": best,
        "ratio": _ratio(valid, best),
        "ratio_to_hf_sorted": _ratio(valid, "hf sorted"),
        "target": TARGETS.get(target_share),
    }


def _ratio(valid: dict[str, float], to: str | None) -> float | None:
    return round(valid["ours"] / valid[to], 3) if to in valid and "ours" in valid else None


def _summary(rounds: list[Any], tokens: int, median_loss: float, least_seconds_a_token: float) -> dict[str, Any]:
    speeds = [tokens / timed.seconds for timed in rounds]
    middle = statistics.median(speeds)
    norms = [norm for timed in rounds for norm in timed.norms]
    loss = statistics.median(timed.loss for timed in rounds)
    reasons = []
    if min(norms) == 0:
        reasons.append("a gradient norm is zero")
    if (used := middle * least_seconds_a_token) > 1:
        reasons.append("over 100 % of the matmul peak")
    if abs(loss - median_loss) > 0.02 * median_loss:
        reasons.append("another loss")
    return {
        "tokens_per_second": round(middle, 1),
        "rounds": [round(speed, 1) for speed in speeds],
        "memory_mib": round(statistics.median(timed.memory_mib for timed in rounds), 1),
        "resident_mib": round(max(timed.resident_mib for timed in rounds), 1),
        "flop_utilisation": round(used, 3),
        "loss_after": round(loss, 5),
        "steps": len(rounds[0].norms),
        "thrown_out": reasons,
    }


def _shapes(args: Any) -> dict[str, Any]:
    if not args.model:
        return SHAPES
    described = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    return {"name": args.model.name, **{name: described[name] for name in SHAPES}}


def _work(rows: list[Any], labelled: float, shapes: dict[str, Any]) -> float:
    """FLOPs that training needs per real token; padding and unlabelled logits do not count."""
    from benchmarks.flops import Shape, a_token

    heads = shapes["hidden_size"] // shapes["num_attention_heads"]
    keys = heads * shapes["num_key_value_heads"]
    h, ffn, layers = shapes["hidden_size"], shapes["intermediate_size"], shapes["num_hidden_layers"]
    linears = [(h, h), (h, keys), (h, keys), (h, h), (h, ffn), (h, ffn), (ffn, h)]
    shape = Shape(
        linear=layers * sum(a * b for a, b in linears),
        lora=layers * sum(16 * (a + b) for a, b in linears),
        attention=layers * h,
        head=shapes["vocab_size"] * h,
    )
    return a_token(shape, [len(row["input_ids"]) for row in rows], labelled, frozen=True, checkpointing=False)


def _log_round(target_share: float, turn: int, rounds: int, name: str, speed: float) -> None:
    print(
        f"share {target_share}  round {turn + 1}/{rounds}  {name:12} {speed:8,.0f} tokens/s",
        file=sys.stderr,
        flush=True,
    )


def _lines(results: dict[str, Any]) -> list[str]:
    from benchmarks.material import table

    machine = results["machine"]
    lines = [
        f"# A step on the CPU, {machine['date']}",
        "",
        f"{machine['processor']}, {machine['threads']} threads, load {machine['load'][0]} at the start, "
        f"{results['matmul_peak_gflops']} GFLOP/s matmul; rows: {results['rows_from']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"`{machine['command']}` at {machine['commit']}, {results['minutes']} minutes",
    ]
    for one in results["sets"]:
        lines += ["", f"## {one['labelled']:.2f} labelled: {one['rows']} rows, {one['tokens']} tokens", ""]
        ours = one["sides"].get("ours", {}).get("tokens_per_second", float("nan"))
        body = [
            [
                name,
                f"{side['tokens_per_second']:,.0f}",
                f"{ours / side['tokens_per_second']:.2f}",
                f"{side['resident_mib' if 'name' in results['model'] else 'memory_mib']:.0f}",
                f"{side['flop_utilisation']:.0%}",
                f"{side['loss_after']:.4f}",
                side["steps"],
                len(side["rounds"]),
                "; ".join(side["thrown_out"]),
            ]
            for name, side in one["sides"].items()
        ]
        head = ["side", "real tokens/s", "ours is faster by", "memory MiB", "of peak", "loss after", "steps", "rounds"]
        lines += table([*head, "thrown out"], body)
        lines += [f"\n{name} could not run: {why}" for name, why in one["could_not_run"].items()]
        if one["ratio"]:
            target = f"; target {one['target']}" if one["target"] else ""
            lines += ["", f"Ours over the best peer ({one['best_peer']}): **{one['ratio']:.2f}**{target}"]
    return lines


def _plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = results["sets"]
    figure, axes = pyplot.subplots(1, len(sets), figsize=(4.2 * len(sets), 3.4), squeeze=False)
    for axis, one in zip(axes[0], sets, strict=True):
        names = list(one["sides"])
        speeds = [one["sides"][name]["tokens_per_second"] for name in names]
        axis.barh(names, speeds, color=["#2563eb" if name == "ours" else "#9ca3af" for name in names])
        axis.invert_yaxis()
        axis.set_title(f"{one['labelled']:.2f} labelled")
        axis.set_xlabel("real tokens/s")
        for place, speed in enumerate(speeds):
            axis.text(speed, place, f" {speed:,.0f}", va="center", fontsize=8)
        axis.margins(x=0.18)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
