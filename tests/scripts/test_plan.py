"""`plan` answers from a config.json alone, in the shape that others read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KEYS = {
    "fits",
    "peak_gib",
    "allocated_gib",
    "parts",
    "effective_batch",
    "batch_size",
    "grad_accum",
    "micro_batch_tokens",
    "remedies",
    "phases",
    "together",
    "method",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: Qwen/Qwen2.5-7B-Instruct, max_seq_len: 2048}\n")
    return path


def test_a_model_too_large_for_the_card_gets_remedies_that_are_enough(
    command: Callable[..., Any], config: Path
) -> None:
    done = command("plan", "--config", config, "--gpu", "RTX 2060", "--json", "--set", "train.batch_size=2")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert set(plan) >= KEYS
    assert (plan["fits"], plan["batch_size"], plan["grad_accum"], plan["effective_batch"]) == (False, 2, 8, 16)
    assert plan["micro_batch_tokens"] == 4096
    assert sum(plan["parts"].values()) == pytest.approx(plan["allocated_gib"], abs=1e-3)
    settings = {remedy["setting"]: remedy for remedy in plan["remedies"]}
    assert settings["train.micro_batch_tokens=2048"]["saves_gib"] > 0.5
    assert plan["together"]["settings"][0] == "train.micro_batch_tokens=2048"
    assert {"training", "evaluation", "generation", "saving", "merging"} == set(plan["phases"])
    assert plan["phases"]["merging"]["disk_gib"] == pytest.approx(14.2, abs=0.1)
    assert plan["peak_gib"] == max(phase["peak_gib"] for phase in plan["phases"].values())
    assert settings["model.name=Qwen/Qwen2.5-3B-Instruct"]["fits"]
    assert plan["method"] == "traced"
    assert "7B-Instruct, qlora (traced)" in done.stderr
    assert "smallest card that would do" in done.stderr


def test_models_of_a_card_and_a_model_in_a_folder(command: Callable[..., Any], config: Path, tiny_t5: Path) -> None:
    done = command(
        "plan", "--config", config, "--gpu", "8GiB", "--models", "Qwen/Qwen2.5-14B-Instruct", str(tiny_t5), "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fit"] == [str(tiny_t5)]  # smallest first, whatever the order asked
    assert list(found["models"]) == [str(tiny_t5), "Qwen/Qwen2.5-14B-Instruct"]
    lone = tiny_t5.parent / "config-alone"
    lone.mkdir()
    (lone / "config.json").write_bytes((tiny_t5 / "config.json").read_bytes())
    short = ("--set", "model.max_seq_len=256")
    done = command(
        "plan",
        "--config",
        config,
        "--gpu",
        "cpu",
        "--json",
        *short,
        "--set",
        f"model.name={lone}",
        "--png",
        lone / "plan.png",
    )
    assert done.returncode == 0, done.stderr
    assert (lone / "plan.png").read_bytes()[:4] == b"\x89PNG"
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert plan["device"]["kind"] == "cpu"
    assert plan["allocated_gib"] < 0.5


def test_an_unknown_card_is_exit_2(command: Callable[..., Any], config: Path) -> None:
    done = command("plan", "--config", config, "--gpu", "RTX 9999X")
    assert done.returncode == 2
    assert "no card of this name" in done.stderr
    assert "Traceback" not in done.stderr
