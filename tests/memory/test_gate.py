"""A run that cannot fit is refused before a weight is loaded, with what would make it fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.config.schema import Config
from sft.errors import EnvironmentProblem
from sft.memory import plan
from sft.memory.estimate import changed
from sft.model.files import ModelFiles
from sft.model.hardware import Hardware
from sft.model.hub import find

MIB = 2**20


def machine(free: int) -> Hardware:
    return Hardware("cpu", "a small machine", None, free, free, bf16=True, count=1)


@pytest.fixture
def files(tiny_qwen2: Path) -> ModelFiles:
    return find(changed(Config().model, name=str(tiny_qwen2)), tiny_qwen2)


def full(files: ModelFiles) -> Config:
    config = Config()
    tuning = changed(config.tuning, mode="full")
    model = changed(config.model, name=files.name, max_seq_len=1024)
    return changed(config, tuning=tuning, model=model, eval=changed(config.eval, batch_size=2))


def test_what_cannot_fit_is_refused_with_what_would_help(
    files: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = machine(530 * MIB)  # Python and torch are presumed to take 512 of them
    with pytest.raises(EnvironmentProblem, match="does not fit") as caught:
        plan.memory_check(full(files), files, small, tmp_path, longest=1024)
    said = str(caught.value)
    assert "train.micro_batch_tokens=1024 saves" in said
    assert "train.gradient_checkpointing=true" in said
    assert "--force" in said
    plan.memory_check(full(files), files, small, tmp_path, longest=1024, force=True)
    assert "tried all the same" in caplog.text


def test_what_is_far_from_the_limit_is_let_through_untraced(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "make_plan", None)  # calling it would be an error
    plan.memory_check(full(files), files, machine(64 * 1024 * MIB), tmp_path, longest=1024)


def test_the_bound_is_above_the_trace(files: ModelFiles, tmp_path: Path) -> None:
    from sft.memory import devices, plan

    config = full(files)
    traced = plan.make_plan(config, files.config, devices.Device("cpu", "cpu", 1000), root=tmp_path).estimate.allocated
    assert (
        traced < plan.bound(files.config, config, files.parameters, 1024) < 4
    )  # so small machines need no trace of it
    assert plan.bound({"model_type": "strange"}, config, 10, 10) == float("inf")


def test_a_model_that_cannot_be_traced_goes_on_and_that_is_said(
    files: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = ModelFiles(files.path, files.name, None, {"model_type": "never-heard-of"}, files.kind)
    plan.memory_check(full(files), strange, machine(530 * MIB), tmp_path, longest=64)
    assert "cannot be made" in caplog.text
