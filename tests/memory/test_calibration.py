"""Measured runs are kept, and what they say of a GPU comes back."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from sft import files
from sft.memory import plan
from sft.memory.plan import Record


def entry(gpu: str, family: str, **values: float) -> Record:
    return Record(gpu, family, "a/model", "qlora", 2048, **values)  # type: ignore[arg-type]


def test_what_was_measured_comes_back_by_gpu_and_family(tmp_path: Path) -> None:
    assert plan.lookup(tmp_path, "RTX 4060", "qwen2") is None
    for drift in (1.0, 1.02, 1.3):
        measured = {"allocated_gib": 4 * drift, "planned_gib": 4.0, "reserved_gib": 4 * drift * 1.05}
        plan.record_calibration(tmp_path, entry("RTX 4060", "qwen2", **measured, context_gib=0.5))
    plan.record_calibration(tmp_path, entry("RTX 4060", "llama", tokens_per_second=500, flops_per_token=2e10))
    found = plan.lookup(tmp_path, "RTX 4060", "qwen2")
    assert found is not None and found.family and found.records == 3
    assert (found.drift, found.slack, found.context_gib) == pytest.approx((1.02, 0.05, 0.5))
    assert (found.flops, found.flops_of) == (1e13, "1 earlier run of other models")
    other = plan.lookup(tmp_path, "RTX 4060", "gemma2")
    assert other is not None and not other.family and other.records == 4
    assert other.flops == 1e13
    assert plan.lookup(tmp_path, "RTX 3060", "qwen2") is None


def test_a_demo_on_a_gpu_says_nothing_of_the_memory_of_real_models(tmp_path: Path) -> None:
    plan.record_calibration(tmp_path, entry("RTX", "qwen2", allocated_gib=0.11, planned_gib=0.05, reserved_gib=0.12))
    found = plan.lookup(tmp_path, "RTX", "qwen2")
    assert found is not None and found.drift is None and found.slack is None


def test_a_spoilt_line_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan.record_calibration(tmp_path, entry("cpu", "qwen2", allocated_gib=1.0))
    with (tmp_path / plan.FILE).open("a") as file:
        file.write('{"gpu": "cpu"\n')
    with (tmp_path / plan.FILE).open("ab") as file:
        file.write(b"\xff\n")
    assert [each.gpu for each in plan.read(tmp_path)] == ["cpu"]
    assert "2 lines" in caplog.text


def test_a_disk_that_refuses_is_said_and_forgiven(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".cache").write_text("in the way")
    plan.record_calibration(tmp_path, entry("cpu", "qwen2"))
    assert "could not be kept" in caplog.text
    assert plan.lookup(tmp_path, "cpu", "qwen2") is None
    caplog.clear()

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files.disk, "write", full)
    plan.record_calibration(tmp_path / "b", entry("cpu", "qwen2"))
    assert "could not be kept" in caplog.text and "No space left" in caplog.text


def test_speed_is_that_of_this_model_and_of_whole_runs_where_they_are(tmp_path: Path) -> None:
    for model, family, stage, speed in (
        ("a/model", "qwen2", "rehearsal", 900),
        ("a/model", "qwen2", "run", 300),
        ("b/model", "qwen2", "run", 500),
    ):
        ran = Record("NVIDIA GeForce RTX 4060", family, model, "qlora", 2048, tokens_per_second=speed, stage=stage)
        plan.record_calibration(tmp_path, replace(ran, flops_per_token=1e9))
    for model, family, flops, of in (
        ("a/model", "qwen2", 3e11, "1 earlier run of this model"),
        ("c/model", "qwen2", 4e11, "2 earlier runs of qwen2 models"),
        ("c/model", "llama", 4e11, "2 earlier runs of other models"),
    ):
        found = plan.lookup(tmp_path, "RTX 4060", family, model)
        assert found is not None
        assert (found.flops, found.flops_of) == (flops, of)
