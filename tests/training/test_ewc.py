"""A run with elastic weight consolidation: what it stores, what a resume reads, how far the weights go."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft import files
from sft.errors import ConfigError, RunError
from sft.step.ewc import Consolidation, trained_weights
from tests.conftest import ROOT
from tests.training import bench, project

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "weight_decay": 0, "learning_rate": 0.1}


def general(root: Path) -> str:
    path = root / "general.jsonl"
    path.write_text(
        '{"user": "What is the capital of France?", "assistant": "It is Paris."}\n'
        '{"user": "2 + 2?", "assistant": "4"}\n'
        '{"user": "Tell me everything", "assistant": "' + "fox " * 200 + '"}\n'
    )
    return str(path)


@pytest.mark.parametrize("budget", [4096, 24])
def test_a_step_is_that_of_the_loss_with_one_penalty_however_it_is_split(
    tiny_qwen2: Path, tmp_path: Path, budget: int
) -> None:
    train = {**SGD, "max_steps": 3, "micro_batch_tokens": budget, "eval_strategy": "no"}
    settings = bench.config(tiny_qwen2, tmp_path / "outputs" / "a", tuning={"mode": "full"}, train=train)
    loop = bench.make_loop(settings)
    fisher = {name: torch.full_like(weight, 0.5) for name, weight in trained_weights(loop.model).items()}
    loop.ewc = Consolidation.around(loop.model, fisher, 2.0)
    base, plain = bench.trained(loop), bench.make_loop(settings)
    penalties = []
    for epoch, indices in loop._remaining_steps():
        if epoch:
            break
        before = bench.trained(loop)
        plain.model.load_state_dict(before, strict=False)
        plain.train_step(plain._load_batch(indices))
        loop.train_step(loop._load_batch(indices))
        for name, weight in bench.trained(loop).items():  # SGD: the penalty's gradient comes on top, once
            expected = bench.trained(plain)[name] - 0.1 * 2.0 * 0.5 * (before[name] - base[name])
            assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-7)
        penalties.append(loop.ewc_penalty)
        moved = sum(float((before[name] - base[name]).double().square().sum()) for name in base)
        assert loop.ewc_penalty == pytest.approx(2.0 / 2 * 0.5 * moved, rel=1e-4, abs=1e-12)
        loop.progress.global_step += 1
    assert len(penalties) == 3 and penalties[0] == 0.0 < penalties[1] < penalties[2]


def test_a_run_stores_its_fisher_information_and_resumes_with_it_bit_for_bit(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("sft"), "propagate", True)
    root = project.make(tmp_path, tiny_qwen2, mode="full")
    sets = (f"train.ewc.path={general(root)}", "train.learning_rate=1e-3", "logging.log_interval=1")
    with pytest.raises(ConfigError, match=r"train.ewc.strength is 1, but tuning.mode is lora") as caught:
        project.run(root, *sets, "train.ewc.strength=1", "tuning.mode=lora")
    assert "--set train.ewc.strength=0" in str(caught.value) and "--set tuning.mode=lora (tuning.mode)" in str(
        caught.value
    )
    project.run(root, *sets, "train.output_dir=outputs/off")
    with caplog.at_level(logging.WARNING, "sft"):
        project.run(root, *sets, "train.ewc.strength=1e6", "train.output_dir=outputs/stiff", "train.max_steps=1")
    assert "train.ewc.strength is 1e+06: a step of the rate 0.001 in every weight costs" in caplog.text
    caplog.clear()
    project.run(root, *sets, "train.ewc.strength=1e3")
    log = dict(project.losses(root, "t", "train/ewc_penalty"))
    assert log[1] == 0.0 < log[6]
    stored = root / "outputs/t/ewc"
    assert {path.name for path in stored.iterdir()} == {"fisher.safetensors", "rows.json", "manifest.json"}
    ledger = json.loads((root / "outputs/t/ledger.json").read_text())["ewc"]
    assert (ledger["rows_read"], ledger["rows_trained"], ledger["reasons"]) == (3, 2, {"over length": 1})
    assert json.loads((root / "outputs/t/model/backend.json").read_text())["ewc"]["strength"] == 1e3

    base = load_file(tiny_qwen2 / "model.safetensors")
    weights = {name: load_file(root / f"outputs/{name}/model/model.safetensors") for name in ("t", "off")}
    fisher = load_file(stored / "fisher.safetensors")

    def distance(run: str) -> float:
        return sum(float((fisher[name] * (weights[run][name] - base[name].float()) ** 2).sum()) for name in fisher)

    assert distance("t") < 0.5 * distance("off")

    (root / "outputs/t/finished.json").unlink()
    for step in (4, 6):
        shutil.rmtree(root / f"outputs/t/checkpoint-{step}")
    (root / "general.jsonl").unlink()  # a resume does not read it again
    with pytest.raises(RunError, match=r"ewc\.strength: was 1000\.0, is 10\.0"):
        project.run(root, *sets, "train.ewc.strength=10")
    project.run(root, *sets, "train.ewc.strength=1e3")
    again = load_file(root / "outputs/t/model/model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights["t"].items())
    assert dict(project.losses(root, "t", "train/ewc_penalty")) == log
    assert json.loads((root / "outputs/t/ledger.json").read_text())["ewc"] == ledger

    (root / "outputs/t/finished.json").unlink()
    shutil.rmtree(root / "outputs/t/checkpoint-6")
    (stored / "fisher.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"Fisher information of this run cannot be used: fisher\.safetensors"):
        project.run(root, *sets, "train.ewc.strength=1e3")


def test_the_base_answers_our_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    root = project.make(tmp_path, ROOT / "models" / "demo", mode="full", rows=8)
    project.run(root, "train.ewc.strength=1", "train.ewc.rows=6", "train.max_steps=1", "train.eval_strategy=no")
    rows = json.loads((root / "outputs/t/ewc/rows.json").read_text())["rows"]
    ledger = json.loads((root / "outputs/t/ledger.json").read_text())["ewc"]
    assert len(rows) == 6 == ledger["rows_read"] and ledger["rows_trained"] == sum(
        bool(row["assistant"]) for row in rows
    )
    assert files.manifest_problem(root / "outputs/t/ewc") is None
