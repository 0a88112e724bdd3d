"""Unsloth's side of `gpu.py`, in its own process: `python benchmarks/unsloth_side.py FOLDER`.

FOLDER has `weights/` (a model and a tokenizer) and `rows.json`. Prints one JSON line. Untested on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    from unsloth import FastLanguageModel  # isort: skip  (it must come before transformers)
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    longest = max(len(row["input_ids"]) for row in rows)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder / "weights"), max_seq_length=longest, load_in_4bit=True, dtype=torch.bfloat16
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0.0, target_modules=names, use_gradient_checkpointing=True
    )
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    args = SFTConfig(
        output_dir=str(folder / "unsloth"),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        bf16=True,
        optim="adamw_torch",
        max_length=longest,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    speeds = []
    for _ in range(3):
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.train()
        torch.cuda.synchronize()
        speeds.append(sum(len(row["input_ids"]) for row in rows) / (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"tokens_per_second": round(max(speeds[1:]), 1), "memory_mib": round(peak, 1)}))


if __name__ == "__main__":
    main()
