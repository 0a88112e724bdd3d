"""DPO on a real model on the CPU: our step against TRL's DPOTrainer on the same pairs, and against SFT on as many rows.

    python benchmarks/dpo.py --model models/smollm2                       # 200 pairs, one epoch, 16 pairs a step
    python benchmarks/dpo.py --model models/smollm2 --pairs 32 --sides ours "trl 4x4"

The pairs are made of real Alpaca rows: the row's answer is the chosen one; the rejected one is another row's answer, or
the first third of its own. Each side is a process of its own (memory is its highest resident size) and takes the same
pairs in the same order, from the same adapter (LoRA r 16 on all linear layers, without dropout), with AdamW. In fp32
(`--dtype fp32 --pairs 64`) the losses of both sides are the same but for rounding.
`trl 4x4`: 4 pairs a micro-batch, 4 micro-batches a step. `sft`: our step on both answers of each pair as plain rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
STEP = 16  # pairs
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a prompt with its answer")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sides", nargs="+", default=["ours", "trl 4x4", "sft"])
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args)))
        return
    from benchmarks import material

    results: Row = {"machine": material.machine(), "pairs": args.pairs, "pairs_a_step": STEP, "sides": {}}
    for side in args.sides:
        command = [sys.executable, *sys.argv, "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
        results["sides"][side] = json.loads(done.stdout.splitlines()[-1])
    head = ["side", "tokens/s", "peak GiB", "loss, first to last step", "margin, first to last step"]
    cells = [
        [
            side,
            f"{one['tokens'] / one['seconds']:,.0f}",
            f"{one['peak_gib']:.2f}",
            _ends(one["losses"]),
            _ends(one["margins"]),
        ]
        for side, one in results["sides"].items()
    ]
    lines = [f"{args.pairs} pairs, {STEP} a step, one epoch, on {results['machine']['processor']}", ""]
    lines += material.table(head, cells)
    path = material.save_results("dpo", results, lines, args.out)
    print("\n".join(lines), f"\n{path} (and .md)")


def _ends(values: list[float]) -> str:
    return f"{values[0]:.4f} to {values[-1]:.4f}" if values else ""


def make_pairs(args: Any) -> list[Row]:
    """Pairs as token rows; the two sides have the same prompt."""
    from benchmarks import material

    rows = material.alpaca(material.ALPACA, args.model / "tokenizer.json", longest=10_000)
    pairs = []
    for number, (row, other) in enumerate(itertools.pairwise(rows)):
        prompt = row["labels"].count(-100)
        answer, wrong = row["input_ids"][prompt:], other["input_ids"][other["labels"].count(-100) :]
        if number % 2:
            wrong = [*answer[: len(answer) // 3], answer[-1]]
        if wrong != answer and max(len(answer), len(wrong)) + prompt <= args.longest:
            ids = [row["input_ids"][:prompt] + side for side in (answer, wrong)]
            labels = [[-100] * prompt + side for side in (answer, wrong)]
            pairs.append({"id": row["id"], "chosen": len(ids[0]), "prompt": prompt})
            pairs[-1] |= {"input_ids": ids[0] + ids[1], "labels": labels[0] + labels[1]}
    return pairs[: args.pairs]


def run_side(args: Any) -> Row:
    """Trains one epoch; losses and margins of the steps, seconds, tokens and the highest resident memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sft.step import attention
    from sft.training.loop import step_batches

    torch.set_num_threads(args.threads)
    pairs = make_pairs(args)
    pairs = [pairs[index] for step in step_batches(len(pairs), STEP, 42, 0) for index in step]
    attention.register()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    kind = "sdpa" if args.side.startswith("trl") else attention.NAME
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation=kind)
    with tempfile.TemporaryDirectory() as folder:
        if args.side.startswith("trl"):
            result = trl(model, lora, pairs, args, Path(folder))
        else:
            result = ours(get_peft_model(model, lora), pairs, args, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    return result | {"tokens": sum(len(pair["input_ids"]) for pair in pairs), "peak_gib": round(peak, 3)}


def same_start(model: Any) -> Any:
    """The model with the same values in its adapter on every side."""
    import torch

    torch.manual_seed(1)
    for name, weight in sorted(model.named_parameters()):
        if "lora_A" in name:
            weight.data = torch.nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5))
        elif "lora_B" in name:
            weight.data = torch.zeros(weight.shape)
    return model


def ours(model: Any, pairs: list[Row], args: Any, folder: Path) -> Row:
    from benchmarks import sides
    from sft.config import auto

    settings = sides.Settings(
        longest=args.longest, folder=folder, rate=args.rate, rows=STEP, bf16=args.dtype == "bf16", tokens=1024
    )
    config = sides.config(settings)
    train: Row = {"objective": "dpo", "seed": 42}
    rows = pairs
    if args.side == "sft":
        train = {"effective_batch": 2 * STEP}
        parts = [(pair, part) for pair in pairs for part in (slice(pair["chosen"]), slice(pair["chosen"], None))]
        rows = [{"id": pair["id"], **{key: pair[key][part] for key in ("input_ids", "labels")}} for pair, part in parts]
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"log_interval": 1})})
    config = auto.resolve(config, auto.Facts("cpu")).config
    loop = sides.loop_of(same_start(model), rows, settings, config)
    loop._remaining_steps = lambda: (  # type: ignore[method-assign]  # the order of the pairs, as on the other side
        (0, list(range(start, min(len(rows), start + int(config.train.effective_batch)))))
        for start in range(0, len(rows), int(config.train.effective_batch))
    )
    loop.fit()
    history = [entry for entry in loop.progress.log_history if "loss" in entry]
    margins = [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]
    return {"losses": [entry["loss"] for entry in history], "margins": margins, "seconds": loop.progress.seconds}


def trl(model: Any, lora: Any, pairs: list[Row], args: Any, folder: Path) -> Row:
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        """Takes rows of tokens, in their order."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset or self.train_dataset)

    disable_progress_bars()
    micro, accumulate = map(int, args.side.split()[1].split("x"))
    config = DPOConfig(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=micro, beta=0.1, max_length=None,
        gradient_accumulation_steps=accumulate, learning_rate=args.rate, lr_scheduler_type="constant", weight_decay=0.0,
        optim="adamw_torch", bf16=args.dtype == "bf16", gradient_checkpointing=False, use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True, report_to=[], remove_unused_columns=False,
    )  # fmt: skip
    rows = [
        {
            "prompt_ids": pair["input_ids"][: pair["prompt"]],
            "chosen_ids": pair["input_ids"][pair["prompt"] : pair["chosen"]],
            "rejected_ids": pair["input_ids"][pair["chosen"] + pair["prompt"] :],
        }
        for pair in pairs
    ]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = InOrder(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    same_start(trainer.model)
    seconds = trainer.train().metrics["train_runtime"]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in history],
        "margins": [entry["rewards/margins"] for entry in history],
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
