"""Training on preference pairs, from stored rows to an adapter: margins, resume, evaluation, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft import runs
from sft.config.schema import PREFERENCES, DataSection
from sft.data.process import process
from sft.errors import ConfigError, DataError
from tests.training import project


@pytest.fixture
def root(tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose rows are pairs: the right name against another one."""
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    return project.as_pairs(project.make(tmp_path, tiny_qwen2))


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "adapters/t/adapter_model.safetensors")


@pytest.mark.parametrize(
    "objective", [one if one == "dpo" else pytest.param(one, marks=pytest.mark.slow) for one in PREFERENCES]
)
def test_a_run_on_pairs_raises_the_margin_and_resumes_exactly(root: Path, objective: str) -> None:
    settings = (f"train.objective={objective}", "train.preference.beta=0.5", "train.load_best_model_at_end=false")
    summary = project.run(root, *settings)
    margins = [value for _, value in project.losses(root, "t", "train/rewards/margins")]
    assert margins[-1] > margins[0] and summary["train_loss_last"] < summary["train_loss_first"]
    evaluated = dict(project.losses(root, "t", "eval/rewards/accuracies"))
    assert list(evaluated) == [2, 4, 6] and all(0 <= value <= 1 for value in evaluated.values())
    assert not project.losses(root, "t", "eval/perplexity")
    assert "rewards/margins" in summary["eval"] and "perplexity" not in summary["eval"]
    stored = runs.run_of_adapter(root / "adapters/t").train
    assert (stored.objective, stored.preference.beta) == (objective, 0.5)
    ledger = json.loads((root / "outputs/t/ledger.json").read_text())["train"]
    assert (ledger["rows_read"], ledger["rows_trained"], ledger["pieces"]) == (20, 20, 40 if objective == "kto" else 20)
    assert ledger["pairs_rated"] == (20 if objective == "kto" else 0)
    straight = weights(root)
    for name in ("checkpoint-6", "finished.json"):
        path = root / "outputs/t" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    project.run(root, *settings)
    resumed = weights(root)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert [value for _, value in project.losses(root, "t", "train/rewards/margins")] == margins


def test_a_step_of_dpo_begins_at_the_reference(root: Path) -> None:
    project.run(root, "train.objective=dpo", "train.max_steps=1", "train.eval_strategy=no")
    assert project.losses(root, "t") == [(1, pytest.approx(0.6931472, abs=1e-4))]
    assert project.losses(root, "t", "train/rewards/margins") == [(1, pytest.approx(0, abs=1e-4))]


def test_a_pair_with_a_side_that_is_dropped_is_dropped_and_named(root: Path) -> None:
    path = root / "data/processed/train.jsonl"
    long = {"id": "long", "prompt": "Who?", "chosen": "Mara", "rejected": "x" * 900}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    job = project.run(root, "train.objective=simpo", "model.over_length=drop", dry=True)
    assert (job["rows"], job["train"]["preference"]["beta"]) == (20, 2.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("train.objective=dpo", "tuning.mode=full"),
            "compares with the base, which is the model with its adapter off",
        ),
        (("train.objective=ipo", "tuning.lora.bias=all"), "whose biases would have changed too"),
        (("train.objective=orpo", "train.labels=all_tokens"), "compares answers, not prompts"),
        (("train.objective=simpo", "train.rehearsal.rows=8"), "and rehearsal has none to compare"),
    ],
)
def test_settings_that_make_no_sense_with_pairs_are_an_error(root: Path, settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        project.run(root, *settings, dry=True)
    assert caught.value.where in " ".join(settings) and "--set" in str(caught.value.fix)


def test_rated_answers_are_processed_and_trained_on_by_kto(root: Path) -> None:
    raw = root / "raw.jsonl"
    rows = [{"prompt": f"Name {n}?", "completion": f"Mara {n}", "label": n % 2 == 0} for n in range(24)]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = process(DataSection(), root, str(raw), rated=True)
    assert (ledger.written, ledger.named.total()) == (24, 0)
    job = project.run(root, "train.objective=kto", dry=True)
    assert job["rows"] == ledger.splits["train"] and job["train"]["preference"]["beta"] == 0.1
    with pytest.raises(DataError, match="is rated as bad") as caught:
        project.run(root, dry=True)
    assert "train.objective=kto" in str(caught.value.fix)
    ledger = process(DataSection(), root, str(raw))
    assert (ledger.written, ledger.named["marked as bad"]) == (12, 12)


def test_rows_with_one_answer_are_refused_by_name(root: Path) -> None:
    path = root / "data/processed/train.jsonl"
    path.write_text(path.read_text() + json.dumps({"id": "one", "user": "Who?", "assistant": "Mara"}) + "\n")
    with pytest.raises(DataError, match="compares two answers, and this row has one") as caught:
        project.run(root, "train.objective=dpo", dry=True)
    assert caught.value.where == "train.jsonl:21"
