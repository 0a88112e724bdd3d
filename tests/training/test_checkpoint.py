"""A run is not resumed under settings that it was not started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft import files
from sft.errors import RunError
from sft.training import checkpoint

WAS = {"backend": "bnb", "base_model": "a/b", "precision": "bf16", "seed": 42, "data": {"train.jsonl": "00"}}
WAS |= checkpoint.OF_OLD_RUNS


def test_the_same_settings_are_accepted(tmp_path: Path) -> None:
    files.write_json(tmp_path / checkpoint.FINGERPRINT, WAS)
    assert checkpoint.check_fingerprint(tmp_path, dict(WAS)) == []


@pytest.mark.parametrize("change", [{"backend": "unsloth"}, {"base_model": "c/d"}, {"precision": "fp16"}])
def test_another_backend_base_or_precision_is_refused_showing_both(tmp_path: Path, change: dict[str, str]) -> None:
    files.write_json(tmp_path / checkpoint.FINGERPRINT, WAS)
    (key, value), *_ = change.items()
    with pytest.raises(RunError) as caught:
        checkpoint.check_fingerprint(tmp_path, WAS | change, allowed=[key])
    assert f"{key}: was {WAS[key]}, is {value}" in str(caught.value)
    assert "--allow-change" not in str(caught.value)


def test_every_difference_is_shown_and_other_changes_can_be_accepted(tmp_path: Path) -> None:
    files.write_json(tmp_path / checkpoint.FINGERPRINT, WAS)
    now = WAS | {"seed": 1, "data": {"train.jsonl": "11"}}
    with pytest.raises(RunError) as caught:
        checkpoint.check_fingerprint(tmp_path, now, allowed=["seed"])
    assert "--allow-change data" in str(caught.value) and "seed" not in str(caught.value)
    assert checkpoint.check_fingerprint(tmp_path, now, allowed=["seed", "data"]) == [
        "data: your rows have changed (train.jsonl) (some rows may be trained twice this epoch and others skipped)",
        "seed: was 42, is 1 (the order of rows changes from here on)",
    ]


def test_a_missing_fingerprint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"backend\.json cannot be read"):
        checkpoint.check_fingerprint(tmp_path, WAS)


def test_a_run_from_before_objectives_and_rehearsal_has_the_defaults(tmp_path: Path) -> None:
    files.write_json(
        tmp_path / checkpoint.FINGERPRINT,
        {key: value for key, value in WAS.items() if key not in ("objective", "rehearsal")},
    )
    assert checkpoint.check_fingerprint(tmp_path, WAS) == []
    with pytest.raises(RunError, match="objective: was response, is other"):
        checkpoint.check_fingerprint(tmp_path, {**WAS, "objective": "other"})
