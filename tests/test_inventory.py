"""The public interface: every make target, flag, config key and output file that a release had is still there.

`inventory.json` was written from commit 5f54d53. What is removed on purpose is listed here, with its successor.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sft.config.load import load
from sft.config.schema import RENAMED, Config
from sft.errors import ConfigError
from tests.conftest import ROOT
from tests.training import project

INVENTORY: dict[str, Any] = json.loads((ROOT / "tests" / "inventory.json").read_text(encoding="utf-8"))
REMOVED_KEYS: dict[str, str] = {}  # key -> the successor that its error must name
REMOVED_CHOICES: dict[str, set[str]] = {}  # key -> values that are an error now
REMOVED_FILES = {"outputs/t/checkpoint-6/session.json"}  # now part of trainer_state.json
REMOVED_LOG_KEYS = {"train/input_wait"}  # rows are in memory: nothing waited
CHANGED_DEFAULTS = {  # key -> its default now
    "train.save_strategy": "auto",
    "data.replay.path": "(required)",
    "logging.backend": "[tensorboard]",
}


@cache
def make_help() -> str:
    return subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_make_target_is_listed() -> None:
    listed = set(re.findall(r"^\s*([a-z0-9-]+)", make_help(), re.MULTILINE))
    assert not set(INVENTORY["make targets"]) - listed


def test_every_make_variable_is_accepted() -> None:
    known = re.search(r"^KNOWN := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert known and not set(INVENTORY["make variables"]) - set(known[1].split())


@pytest.mark.parametrize("script", sorted(INVENTORY["flags"]))
def test_every_script_keeps_its_flags(script: str) -> None:
    shown = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", shown))
    assert not set(INVENTORY["flags"][script]) - flags


def schema_keys(section: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema that is not a section, with its default."""
    keys: dict[str, Any] = {}
    values = section if section is not None else Config()
    for name in type(values).model_fields:
        value = getattr(values, name)
        if hasattr(type(value), "model_fields"):
            keys |= schema_keys(value, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = value
    return keys


def test_every_config_key_is_accepted_or_names_its_successor(tmp_path: Path) -> None:
    keys = schema_keys()
    keys |= {spelling: keys[key] for spelling, key in RENAMED.items()}
    gone = {key for key in INVENTORY["config keys"] if key not in keys and not parent_is_nullable(key, keys)}
    assert gone == set(REMOVED_KEYS), gone ^ set(REMOVED_KEYS)
    for key, successor in REMOVED_KEYS.items():
        with pytest.raises(ConfigError, match=re.escape(successor)):
            load(ROOT / "configs" / "config_base.yaml", [f"{key}=1"], root=tmp_path)


def parent_is_nullable(key: str, keys: dict[str, Any]) -> bool:
    """Whether a section above `key` is null or a list by default, so that the defaults do not show the key."""
    parts = key.split(".")
    return any(".".join(parts[:depth]) in keys for depth in range(1, len(parts)))


def test_every_choice_of_a_key_is_accepted() -> None:
    reference = (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8")
    for key, entry in INVENTORY["config keys"].items():
        row = next((line for line in reference.splitlines() if line.startswith(f"| `{RENAMED.get(key, key)}` |")), "")
        missing = {choice for choice in entry["choices"] if f"`{choice}`" not in row}
        assert missing <= REMOVED_CHOICES.get(key, set()), (key, missing)


def test_no_default_changes_unnoticed() -> None:
    reference = (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8")
    for key, entry in INVENTORY["config keys"].items():
        row = next((line for line in reference.splitlines() if line.startswith(f"| `{RENAMED.get(key, key)}` |")), None)
        if row is None:
            assert key in REMOVED_KEYS, key
            continue
        expected = CHANGED_DEFAULTS.get(key, entry["default"])
        assert f"| {expected} |" in row or f"| `{expected}` |" in row, (key, expected, row)


def test_a_run_leaves_the_same_files_log_keys_and_curves(
    tmp_path: Path, tiny_qwen2: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    flags = ["--config", "config.yaml"]
    for args in (
        ["train", *flags],
        ["eval", *flags, "--split", "test", "--both"],
        ["merge_lora", *flags, "--out", "outputs/merged", "--dtype", "fp32"],
    ):
        done = command(*args, cwd=root, SFT_ROOT=str(root))
        assert done.returncode == 0, done.stderr
    paths = [path for top in ("outputs", "adapters") for path in (root / top).rglob("*") if not path.is_dir()]
    names = {re.sub(r"tfevents\..*", "tfevents.*", path.relative_to(root).as_posix()) for path in paths}
    assert set(INVENTORY["files of a run"]) - names == REMOVED_FILES

    lines = (root / "outputs" / "t" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert set(INVENTORY["log keys"]) - keys == REMOVED_LOG_KEYS

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "outputs" / "tb" / "t"))
    events.Reload()
    for kind, tags in INVENTORY["tensorboard tags"].items():
        assert not set(tags) - set(events.Tags()[kind]) - REMOVED_LOG_KEYS

    metrics = json.loads((root / "outputs" / "metrics.json").read_text(encoding="utf-8"))
    assert not set(INVENTORY["metrics.json"]) - set(metrics)
    for side in ("base", "tuned"):
        assert not set(INVENTORY["metrics.json sides"]) - set(metrics[side])
