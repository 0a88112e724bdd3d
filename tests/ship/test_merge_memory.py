"""2 GiB are merged and verified with the memory of one shard and 1 GiB; a killed merge leaves no partial folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from sft.model.files import weight_files
from tests.conftest import ROOT
from tests.tiny_models import byte_level_tokenizer

SHARD = 480 * 10**6  # bytes
CONFIG = Qwen2Config(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=23, num_attention_heads=16,
    num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16", architectures=["Qwen2ForCausalLM"],
)  # fmt: skip


def random_model(folder: Path) -> Path:
    """About 2 GiB of bf16 weights, written shard by shard."""
    byte_level_tokenizer(folder)
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(CONFIG).named_parameters()}
    held: dict[str, torch.Tensor] = {}
    index, number = {}, 0
    for at, (name, shape) in enumerate(shapes.items()):
        held[name] = torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape) * 0.02
        held[name] = held[name].bfloat16()
        last = at == len(shapes) - 1
        if last or sum(weight.nbytes for weight in held.values()) > SHARD - 140 * 10**6:
            number += 1
            save_file(held, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})
            index.update(dict.fromkeys(held, f"model-{number:05}.safetensors"))
            held = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def random_adapter(base: Path, out: Path) -> Path:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(model, config)
    config.base_model_name_or_path = str(base)
    named = {
        name.replace(".default", ""): torch.randn(weight.shape) * 0.02
        for name, weight in model.named_parameters()
        if "lora_" in name
    }
    config.save_pretrained(out)
    save_file(named, out / "adapter_model.safetensors")
    return out


def merge_command(tmp_path: Path) -> list[str]:
    config = tmp_path / "c.yaml"
    config.write_text("model: {name: base}\n")
    named = ["--adapters", tmp_path / "a", "--out", tmp_path / "m", "--dtype", "bf16", "--config", config, "--json"]
    return [sys.executable, str(ROOT / "scripts" / "merge_lora.py"), *map(str, named)]


@pytest.mark.slow
def test_two_gib_are_merged_and_verified_in_one_shard_plus_one_gib_of_memory(tmp_path):
    base = random_model(tmp_path / "base")
    shards = [path.stat().st_size for path in weight_files(base, "base")]
    assert sum(shards) >= 2 * 2**30
    assert max(shards) <= 500 * 10**6
    random_adapter(base, tmp_path / "a")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SFT_ROOT": str(tmp_path)}
    watcher = (
        "import resource, subprocess, sys\ndone = subprocess.run(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, flush=True)\n"
        "sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", watcher, *merge_command(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(re.findall(r"^peak (\d+)$", done.stdout, re.MULTILINE)[-1])
    assert peak <= max(shards) + 2**30, f"{peak / 2**30:.2f} GiB"
    report = json.loads(done.stdout.splitlines()[0])
    assert report["bytes"] >= 2 * 2**30
    assert report["top1_agreement"] > 0.9
    assert report["mean_kl"] < 1e-2


@pytest.mark.slow
def test_a_killed_merge_leaves_no_partial_folder(tmp_path):
    random_adapter(random_model(tmp_path / "base"), tmp_path / "a")
    running = subprocess.Popen(
        merge_command(tmp_path), env={**os.environ, "SFT_ROOT": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(tmp_path.glob(".m.*.part/*.safetensors")) and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
