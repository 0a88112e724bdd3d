"""`sweep` trains every combination once, goes on where it stopped, and halves by the validation metric."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sweep
import train
from sft.config.load import load
from sft.config.schema import Config
from sft.errors import ConfigError
from tests.conftest import ROOT
from tests.training import project

Command = Callable[..., subprocess.CompletedProcess[str]]
FEW = ("--set", "train.max_steps=4", "--set", "eval.train_sample=0")


def test_values_are_parted_at_commas_outside_of_brackets() -> None:
    assert sweep.parse_values(["train.learning_rate=1e-4,3e-4 tuning.lora.r=8"]) == {
        "train.learning_rate": ["1e-4", "3e-4"],
        "tuning.lora.r": ["8"],
    }
    assert sweep.parse_values(["tuning.lora.target_modules=[q_proj, v_proj],auto"]) == {
        "tuning.lora.target_modules": ["[q_proj, v_proj]", "auto"]
    }


@pytest.mark.parametrize("text", ["", "train.epochs", "train.epochs=", "epochs=1,2", "train.epochs=1,,2"])
def test_values_of_another_form_are_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        sweep.parse_values([text])


def test_a_value_or_key_twice_is_an_error() -> None:
    for text in ("train.epochs=1,1", "train.epochs=1 train.epochs=2"):
        with pytest.raises(ConfigError, match="named twice"):
            sweep.parse_values([text])


def test_the_rungs_of_halving() -> None:
    assert sweep.shares(2) == [0.5, 1]
    assert sweep.shares(3) == sweep.shares(4) == [0.25, 0.5, 1]
    assert sweep.shares(1) == [1]


def test_a_value_that_is_not_finite_ranks_last_in_either_direction() -> None:
    values = {"a": 2.0, "b": float("nan"), "c": 1.0, "d": None}
    trials = [sweep.Trial(name, {}, Config(), {"1": {"step": 4, "value": value}}) for name, value in values.items()]
    assert [trial.name for trial in sweep.order(trials, ("loss", False))][:2] == ["c", "a"]
    assert [trial.name for trial in sweep.order(trials, ("rougeL", True))][:2] == ["a", "c"]


def test_the_metric_is_that_of_the_best_checkpoint(tmp_path: Path) -> None:
    base = ROOT / "configs" / "config_base.yaml"

    def metric(*sets: str) -> tuple[str, bool]:
        return sweep.metric_of(load(base, sets, root=tmp_path).config)

    assert metric() == ("loss", False)
    assert metric("train.metric_for_best_model=eval_rougeL") == ("rougeL", True)
    with pytest.raises(ConfigError, match="nothing is evaluated"):
        metric("train.eval_strategy=no")


def test_until_stops_with_an_evaluation_and_the_same_command_ends_the_run_as_if_it_had_not(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    monkeypatch.setenv("SFT_ROOT", str(root))
    few = [*FEW[1::2], "train.eval_steps=4", "train.save_steps=4"]

    def until(step: str) -> Any:
        line = ["--config", str(root / "config.yaml"), "--until", step]
        line += [part for each in (*few, "train.output_dir=outputs/parts") for part in ("--set", each)]
        return train.main(train.build_parser().parse_args(line))

    for step, expected in (("0.25", 1), ("3", 3), ("2", 3)):
        stopped = until(step)
        assert (stopped["steps"], stopped["planned_steps"]) == (expected, 4)
        assert stopped["eval"]["loss"] > 0
    whole = project.run(root, *few, "train.output_dir=outputs/whole")
    assert until("9")["eval"]["loss"] == whole["eval"]["loss"]
    assert project.losses(root, "whole", "eval/loss") == project.losses(root, "parts", "eval/loss")[-1:]
    with pytest.raises(ConfigError, match="is no step"):
        until("0")


@pytest.mark.slow
def test_halving_stops_the_worse_run_and_the_other_is_the_run_that_it_would_be_alone(
    tmp_path: Path, tiny_qwen2: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    line = ["sweep", "train.learning_rate=1e-5,5e-3", "--halving", "--config", "config.yaml", *FEW, "--json"]
    done = command(*line, cwd=root, SFT_ROOT=str(root))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    worse, better = result["trials"]
    assert result["best"]["run"] == better["run"] and better["values"] == {"train.learning_rate": "5e-3"}
    assert set(worse["results"]) == {"0.5"} and set(better["results"]) == {"0.5", "1"}
    assert worse["results"]["0.5"]["step"] == 2 and better["results"]["1"]["step"] == 4
    assert (root / "outputs" / "last").resolve().name == better["run"]
    assert not (root / "outputs" / worse["run"] / "finished.json").exists()
    assert (root / "outputs" / "t-sweep" / "sweep.png").stat().st_size > 5_000
    sessions = {path.parent.name for path in (root / "outputs" / "tb" / "t-sweep").glob("*/events*")}
    assert sessions == {worse["run"], better["run"]}

    again = command(*line, cwd=root, SFT_ROOT=str(root))
    assert again.returncode == 0 and json.loads(again.stdout)["trials"] == result["trials"]
    assert "== " not in again.stderr  # nothing was trained

    monkeypatch.setenv("SFT_ROOT", str(root))
    project.run(root, *FEW[1::2], "train.learning_rate=5e-3", "train.output_dir=outputs/alone")
    of_sweep, alone = (project.losses(root, name, "eval/loss") for name in (better["run"], "alone"))
    assert of_sweep == alone and better["results"]["1"]["value"] == min(loss for _, loss in alone)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_a_failed_run_does_not_end_it(
    tmp_path: Path, tiny_qwen2: Path, command: Command
) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    flags = ["tuning.lora.target_modules=[q_proj],[nothing],auto", "--config", "config.yaml", *FEW, "--json"]
    env: dict[str, Any] = {**os.environ, "SFT_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *flags]
    with subprocess.Popen(script, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list(root.glob("outputs/*/checkpoint-2")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) in (0, 143)
    done = command("sweep", *flags, cwd=root, SFT_ROOT=str(root))
    assert done.returncode == 0, done.stderr
    first, failed, last = json.loads(done.stdout)["trials"]
    assert first["results"]["1"]["step"] == last["results"]["1"]["step"] == 4
    assert failed["error"] and not failed["results"] and "failed" in done.stderr
    assert len(list((root / "outputs").glob("t-*/finished.json"))) == 2
