"""`plan` answers from a config.json alone, in the shape that others read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plan as plan_command
from sft.errors import ConfigError

KEYS = {
    "fits",
    "peak_gib",
    "allocated_gib",
    "parts",
    "phases",
    "worst_phase",
    "effective_batch",
    "batch_size",
    "grad_accum",
    "micro_batch_tokens",
    "remedies",
    "together",
    "smallest_card",
    "residual",
    "method",
    "device",
    "model",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: Qwen/Qwen2.5-7B-Instruct, max_seq_len: 2048}\n")
    return path


def test_a_model_too_large_for_the_card_gets_suggestions_that_suffice(
    command: Callable[..., Any], config: Path
) -> None:
    done = command("plan", "--config", config, "--gpu", "RTX 2060", "--json", "--set", "train.batch_size=2")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert set(plan) == KEYS
    assert (plan["fits"], plan["batch_size"], plan["grad_accum"], plan["effective_batch"]) == (False, 2, 8, 16)
    assert plan["micro_batch_tokens"] == 4096
    assert sum(plan["parts"].values()) == pytest.approx(plan["allocated_gib"], abs=1e-3)
    settings = {remedy["setting"]: remedy for remedy in plan["remedies"]}
    assert settings["train.micro_batch_tokens=2048"]["saves_gib"] > 0.5
    assert plan["together"]["settings"][0] == "train.micro_batch_tokens=2048"
    assert {"training", "evaluation", "generation"} == set(plan["phases"])
    assert plan["peak_gib"] == max(phase["peak_gib"] for phase in plan["phases"].values())
    assert settings["model.name=Qwen/Qwen2.5-3B-Instruct"]["fits"]
    assert plan["method"] == "traced"
    assert "7B-Instruct, qlora, rows of 2048 tokens:\ndoes NOT fit RTX 2060 (6.0 GiB)" in done.stderr
    assert "smallest card that would do" in done.stderr
    too_wide = [
        line for line in done.stderr.splitlines() if len(line) > 80 and not line.startswith(("it fits", "config: "))
    ]
    assert not too_wide


def test_models_that_fit_a_card_a_local_model_and_the_picture(
    config: Path, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))

    def plan(*arguments: object) -> dict[str, Any]:
        return plan_command.main(
            plan_command.build_parser().parse_args(["--config", str(config), *map(str, arguments)])
        )

    models = plan("--gpu", "8GiB", "--models", "Qwen/Qwen2.5-14B-Instruct", tiny_t5)
    assert models["fit"] == [str(tiny_t5)]  # smallest first, whatever order they were given in
    assert list(models["models"]) == [str(tiny_t5), "Qwen/Qwen2.5-14B-Instruct"]
    lone = tmp_path / "config-alone"
    lone.mkdir()
    (lone / "config.json").write_bytes((tiny_t5 / "config.json").read_bytes())
    short, name = ("--set", "model.max_seq_len=256"), ("--set", f"model.name={lone}")
    result = plan("--gpu", "cpu", *short, *name, "--png", lone / "plan.png")
    assert (lone / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert result["fits"]
    assert result["device"]["kind"] == "cpu"
    assert result["allocated_gib"] < 0.5


def test_models_are_planned_for_a_gpu_with_qlora_unless_a_flag_says_otherwise(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.memory import devices

    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    monkeypatch.setattr(devices, "this_machine", devices.this_cpu)
    (tmp_path / "configs").mkdir()
    for name, mode in (("run_bnb", "qlora"), ("local", "lora")):  # as a quick start without a GPU leaves it
        (tmp_path / "configs" / f"{name}.yaml").write_text(f"tuning: {{mode: {mode}}}\nmodel: {{max_seq_len: 64}}\n")
    local = tmp_path / "configs" / "local.yaml"

    def title(*arguments: str) -> str:
        line = ["--config", str(local), "--models", str(tiny_qwen2), *arguments]
        plan_command.main(plan_command.build_parser().parse_args(line))
        return capsys.readouterr().out

    assert "a card of 8 GiB, qlora, rows of 64 tokens" in title()
    assert "a card of 8 GiB, lora," in title("--set", "tuning.mode=lora")
    assert "CPU of this machine, lora," in title("--gpu", "cpu")


def test_two_cards_share_the_weights(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{name: {tiny_qwen2}, max_seq_len: 64}}\ntuning: {{mode: full}}\n")

    def plan(*arguments: str) -> dict[str, Any]:
        return plan_command.main(plan_command.build_parser().parse_args(["--config", str(config), *arguments]))

    copies, shared = (plan("--gpu", "2x RTX 4090", "--shard", shard) for shard in ("ddp", "fsdp"))
    assert shared["parts"]["optimizer"] == pytest.approx(copies["parts"]["optimizer"] / 2, rel=0.05)
    assert (shared["sharding"], shared["device"]["count"], shared["device"]["gib"]) == ("fsdp", 2, 24)
    pairs = ("--set", "tuning.mode=lora", "--set", "train.objective=dpo")  # whose first pass is the reference's
    assert plan("--gpu", "2x24GiB", "--shard", "fsdp", *pairs)["parts"]["adapters"] > 0
    speed = plan("--gpu", "2x RTX 4090", "--shard", "fsdp", "--link", "10")["speed"]
    assert speed["sending_seconds"] == pytest.approx(speed["sent_bytes"] / 10e9)
    slow, fast = speed["tokens_per_second"]
    longest = max(speed["sending_seconds"], speed["arithmetic_seconds"])
    assert fast == pytest.approx(speed["tokens_a_step"] / longest) and slow < fast
    assert "2 x RTX 4090 (24.0 GiB each), sharded" in capsys.readouterr().out
    for arguments, message in (
        (("--gpu", "24GiB", "--shard", "fsdp"), "one device shards nothing"),
        (
            ("--gpu", "2x24GiB", "--shard", "fsdp", "--set", "tuning.mode=lora", "--set", "train.optim=adamw_8bit"),
            "FSDP",
        ),
        (("--gpu", "2x24GiB", "--link", "0"), "0 is no speed"),
        (("--gpu", "24GiB", "--clusters"), "no published speed of a card of 24 GiB"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(*arguments)


def test_an_unknown_card_is_exit_2(command: Callable[..., Any], config: Path) -> None:
    done = command("plan", "--config", config, "--gpu", "RTX 9999X")
    assert done.returncode == 2
    assert "unknown card" in done.stderr
    assert "Traceback" not in done.stderr
