"""The whole way on the demo model, and real files through it: minutes each, so they run in `make test-all`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.conftest import ROOT

Command = Callable[..., CompletedProcess[str]]
pytestmark = pytest.mark.slow


def bars(metrics: dict[str, Any]) -> None:
    """What the demo's tuned model must reach on its test split."""
    base, tuned, constant = metrics["base"], metrics["tuned"], metrics["constant"]
    assert metrics["rows"] >= 50
    assert base["exact_match"] <= 0.10 and tuned["exact_match"] >= 0.90
    assert tuned["rougeL"] >= 0.6 and tuned["rougeL"] >= 3 * base["rougeL"]
    assert tuned["rougeL"] >= constant["rougeL"] + 0.3 and constant["exact_match"] <= 0.10
    assert tuned["stop_rate"] >= 0.95


def test_the_quick_start_ends_with_a_tuned_model_that_passes_the_bars(command: Command, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("local.yaml*"))
    shutil.copytree(ROOT / "data" / "samples", tmp_path / "data" / "samples")
    done = command("quick_start", "--yes", "--demo", SFT_ROOT=str(tmp_path), OMP_NUM_THREADS="2", timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "What to do next" in done.stdout
    assert (tmp_path / "configs" / "local.yaml").exists()
    bars(json.loads((tmp_path / "outputs" / "metrics.json").read_text()))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_holds_its_bars_for_three_seeds(command: Command, tmp_path: Path, seed: int) -> None:
    config = ROOT / "configs" / "demo_cpu.yaml"
    raw = ROOT / "data" / "samples" / "support_desk.jsonl"
    env = {"SFT_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    flags = ("--config", config, "--set", f"train.seed={seed}")
    assert command("process_data", *flags, "--raw_path", raw, **env).returncode == 0
    trained = command("train", *flags, timeout=900, **env)
    assert trained.returncode == 0, trained.stderr[-2000:]
    scored = command("eval", *flags, "--split", "test", "--both", "--json", **env)
    assert scored.returncode == 0, scored.stderr[-2000:]
    bars(json.loads(scored.stdout))


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "gsm8k_train.jsonl", "truthfulqa.csv"])
def test_real_files_go_the_whole_way(command: Command, shared: Path, tmp_path: Path, name: str) -> None:
    env = {"SFT_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    flags: list[Any] = ["--config", ROOT / "configs" / "demo_cpu.yaml", "--set", "tuning.mode=qlora"]
    flags += ["--set", "train.max_steps=200", "--set", "train.epochs=100", "--set", "train.eval_strategy=no"]
    flags += ["--set", "logging.log_interval=1"]
    if name == "truthfulqa.csv":
        flags += ["--set", "data.columns.user=Question", "--set", "data.columns.assistant=Best Answer"]
    processed = command("process_data", *flags, "--raw_path", shared / "instruct" / name, "--json", **env)
    assert processed.returncode == 0, processed.stderr
    trained = command("train", *flags, timeout=900, **env)
    assert trained.returncode == 0, trained.stderr[-2000:]
    log = (tmp_path / "outputs" / "demo" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 200
    assert sum(losses[-20:]) <= 0.8 * sum(losses[:20])
    assert command("eval", *flags, "--split", "val", "--limit", "8", **env).returncode == 0
    questions = tmp_path / "in.txt"
    questions.write_text("What is 2 + 2?\nName a colour.\n")
    batch = ("--mode", "batch", "--input_file", questions, "--output_file", tmp_path / "out.txt")
    assert command("infer", *flags, *batch, **env).returncode == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 2
    assert command("merge_lora", *flags, "--out", tmp_path / "merged", "--dtype", "fp16", **env).returncode == 0


def test_several_data_sets_go_through_and_a_broken_one_stops_nobody(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps({"question": f"q {n}", "answer": f"a {n}"}) + "\n" for n in range(20)))
    bad.write_text("not json at all\n")
    done = subprocess.run(
        [str(ROOT / "workflows" / "batch_process.sh"), str(bad), str(good)],
        env={**os.environ, "SFT_ROOT": str(tmp_path), "CONFIG": str(ROOT / "configs" / "demo_cpu.yaml")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "bad: failed at process (exit 2)" in done.stdout and "good: done" in done.stdout
    assert (tmp_path / "data" / "processed" / "good" / "train.jsonl").exists()
