"""The machine's hardware, which backend it can use, and tokens that are read but never shown."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import psutil
import pytest
import torch

from sft.config.schema import TuningSection
from sft.errors import ConfigError, redact
from sft.model import backends, hardware, hub

UNSLOTH = TuningSection(backend="unsloth")


@pytest.fixture
def no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in hub.TOKEN_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "nowhere"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_and_its_memory_are_reported():
    device = hardware.probe()
    assert (device.device, device.capability, device.bf16, device.count) == ("cpu", None, True, 1)
    assert 0 < device.free_bytes < device.total_bytes <= psutil.virtual_memory().total
    assert hardware.gpus() == []
    assert hardware.gpu_stats() is None


def test_the_gpu_that_the_config_names_is_used_or_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device_map is cuda:1, and this machine has no CUDA GPU"):
        hardware.choose("cuda:1")
    assert hardware.choose("cpu").name == hardware.choose("auto").name == "the CPU"
    chosen = [0]
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: chosen[-1],
        "set_device": chosen.append,
        "mem_get_info": lambda index: (1000 + index, 2000),
        "get_device_name": lambda index: f"card {index}",
        "get_device_capability": lambda index: (8, 6),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert (hardware.choose("cuda:1").name, hardware.choose("cuda:1").free_bytes, chosen[-1]) == ("card 1", 1001, 1)
    for name in ("cuda:2", "gpu"):
        with pytest.raises(ConfigError, match=f"{name}, and this machine has cuda:0, cuda:1"):
            hardware.choose(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nvml_and_torch_report_the_same_gpu():
    device, first = hardware.probe(), hardware.gpus()[0]
    assert (device.device, device.name, device.capability) == ("cuda", first.name, first.capability)
    stats = hardware.gpu_stats()
    assert stats is not None
    assert 0 < stats["memory_used"] < stats["memory_total"]


def test_unsloth_falls_back_where_there_is_no_gpu_and_logs_why_once(caplog):
    assert backends.choose(TuningSection(), cuda=False) == backends.Backend("bnb")
    assert backends.choose(UNSLOTH, cuda=False) == backends.Backend("bnb", "there is no CUDA GPU")
    if hardware.gpus():
        return
    logging.getLogger("sft").propagate = True
    with caplog.at_level("WARNING"):
        assert backends.prepare(UNSLOTH).name == "bnb"
    assert [record.getMessage() for record in caplog.records] == [
        "tuning.backend is unsloth, but there is no CUDA GPU: training with bnb instead"
    ]


def test_unsloth_needs_its_package_and_a_causal_model():
    assert backends.choose(UNSLOTH, cuda=True, kind="seq2seq").reason == "unsloth trains only decoder-only models"
    assert "not installed" in str(backends.choose(UNSLOTH, cuda=True).reason)
    for settings, reason in (
        ({"adapter": "prefix"}, "it has no tuning.adapter: prefix"),
        ({"mode": "full", "freeze": ["embed"]}, "it has no tuning.freeze"),
        ({"lora": {"use_dora": True}}, "it has no tuning.lora.use_dora"),
    ):
        tuning = TuningSection.model_validate({"backend": "unsloth", **settings})
        assert backends.choose(tuning, cuda=True).reason == reason


@pytest.mark.usefixtures("no_tokens")
def test_tokens_are_found_in_order_and_never_shown(monkeypatch, tmp_path):
    assert hub.find_token(tmp_path) == (None, "")
    (tmp_path / ".env").write_text("HUGGINGFACE_HUB_TOKEN='from-dot-env-1234'\n")
    assert hub.find_token(tmp_path) == ("from-dot-env-1234", ".env (HUGGINGFACE_HUB_TOKEN)")
    monkeypatch.setenv("HUGGINGFACE_HUB_TOKEN", "from-second-1234")
    assert hub.find_token(tmp_path) == ("from-second-1234", "HUGGINGFACE_HUB_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "from-first-1234")
    assert hub.find_token(tmp_path) == ("from-first-1234", "HF_TOKEN")
    text = "Bearer from-first-1234, from-dot-env-1234 and hf_" + "AbcDef0123456789"
    assert redact(text) == "Bearer hf_***, hf_*** and hf_***"


@pytest.mark.usefixtures("no_tokens")
def test_a_token_in_dot_env_reaches_every_library(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("HF_TOKEN=from-dot-env-1234\n")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    assert hub.install_token(tmp_path) == ".env (HF_TOKEN)"
    assert os.environ.pop("HF_TOKEN") == "from-dot-env-1234"


def test_offline_means_that_no_request_is_sent():
    assert hub.offline()
    assert not hub.reachable(0.1)


def test_gpu_memory_grows_in_place_unless_the_user_or_wsl_forbids_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = {"native": "6.8.0-generic", "wsl": "5.15.167.4-microsoft-standard-WSL2"}
    for release, theirs, expected in [
        ("native", None, "expandable_segments:True"),
        ("wsl", None, None),
        ("native", "max_split_size_mb:64", "max_split_size_mb:64"),
    ]:
        monkeypatch.setattr(hardware.platform, "release", lambda name=release: kernel[name])
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        if theirs is not None:
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", theirs)
        hardware.probe()
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
