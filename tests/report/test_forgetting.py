"""The general set: every reference passes its own checks, wrong answers do not, and the verdict follows the figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sft import runs
from sft.config.schema import Config
from sft.errors import DataError
from sft.generation.load import Target
from sft.report import bootstrap, compare

ROOT = Path(__file__).resolve().parents[2]


def test_every_shipped_reference_passes_its_own_check_and_no_other_kinds_answer_does() -> None:
    rows = compare.general_rows(None, ROOT)
    assert 40 <= len(rows) <= 60
    assert {row["kind"] for row in rows} == {"instruction", "arithmetic", "format", "talk"}
    failed = [row["id"] for row in rows if compare.passes(row["assistant"], row["check"]) != 1.0]
    assert not failed
    for nothing in ("", "   ", "48213 | kettle | Mara Olsen | 4 April"):  # what a model that does one task alone says
        passed = [row["id"] for row in rows if compare.passes(nothing, row["check"])]
        assert len(passed) <= 2, passed


@pytest.mark.parametrize(
    ("answer", "check", "holds"),
    [
        ("It is 12.", {"number": 12}, 1.0),
        ("It is 12.5.", {"number": 12}, 0.0),
        ('{"a": 1, "b": 2}', {"json": ["a"]}, 1.0),
        ('{"b": 2}', {"json": ["a"]}, 0.0),
        ('Sure: {"a": 1}', {"json": ["a"]}, 0.0),
        ("one\n\ntwo", {"lines": 2}, 1.0),
        ("one two three", {"max_words": 2}, 0.0),
        ("As an AI, yes", {"matches": "yes", "excludes": "as an ai"}, 0.0),
        ("pear and plum", {"matches": ["pear", "PLUM"]}, 1.0),
        ("pear", {"matches": ["pear", "plum"]}, 0.0),
    ],
)
def test_each_kind_of_check_passes_and_fails(answer: str, check: dict[str, object], holds: float) -> None:
    assert compare.passes(answer, check) == holds


def test_a_row_without_a_check_does_not_count() -> None:
    assert math.isnan(compare.passes("anything", {}))


def test_a_check_that_cannot_be_read_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text('{"user": "a", "assistant": "b"}\n{"user": "a", "assistant": "b", "check": {"mathces": "b"}}\n')
    with pytest.raises(DataError, match="mathces") as error:
        compare.general_rows(path, tmp_path)
    assert "g.jsonl:2" in str(error.value)
    path.write_text('{"user": "a", "assistant": "b", "check": {"matches": "("}}\n')
    with pytest.raises(DataError, match="not a regular expression"):
        compare.general_rows(path, tmp_path)


def test_the_verdict_follows_loss_and_checks() -> None:
    base = [2.0 + row / 100 for row in range(50)]

    def loss(rise: float) -> bootstrap.Difference:
        return bootstrap.difference(base, [value + rise for value in base], greater_is_better=False)

    unchanged = bootstrap.difference([1.0] * 25 + [0.0] * 25, [1.0] * 25 + [0.0] * 25)
    lost = bootstrap.difference([1.0] * 25 + [0.0] * 25, [1.0] * 5 + [0.0] * 45)
    assert compare.forgetting(loss(0.0), unchanged)["level"] == "none"
    assert compare.forgetting(loss(-0.4), unchanged)["level"] == "none"
    assert compare.forgetting(loss(0.05), unchanged)["level"] == "slight"
    assert compare.forgetting(loss(0.5), unchanged)["level"] == "forgotten"
    assert compare.forgetting(loss(0.0), lost)["level"] == "forgotten"
    assert compare.forgetting(loss(0.5), None)["level"] == "forgotten"
    endless = bootstrap.difference([1.0] * 45 + [0.0] * 5, [1.0] * 10 + [0.0] * 40)
    judged = compare.forgetting(loss(0.0), unchanged, endless, "to keep the rest: ...")
    assert judged["headline"] == "It has forgotten general abilities: answers no longer end by themselves"
    assert "end by themselves: 90%, now 20%" in judged["words"] and judged["words"].endswith("; to keep the rest: ...")
    assert "keep" not in compare.forgetting(loss(0.0), unchanged, unchanged, "to keep the rest: ...")["words"]
    assert compare.forgetting(loss(0.0), unchanged, unchanged)["level"] == "none"
    assert "x1.65" in compare.forgetting(loss(0.5), None)["words"]  # e to the half


def test_the_remedy_names_a_setting_that_the_run_did_not_have(tmp_path: Path) -> None:
    run = runs.at(tmp_path / "outputs" / "mine", tmp_path)
    run.folder.mkdir(parents=True)

    def remedy(rate: float = 2e-4, mode: str = "lora", **train: object) -> str:
        config = Config.model_validate({"tuning": {"mode": mode}, "train": {"learning_rate": rate, **train}})
        return compare.against_forgetting(Target(config, run), tmp_path).removeprefix("to keep more of the rest: ")

    assert remedy() == "make train SET=train.rehearsal.rows=100"
    assert remedy(objective="dpo").endswith("SET=train.learning_rate=0.0001")  # rehearsal has no pairs
    lora = "tuning.mode=lora train.learning_rate=auto train.ewc.strength=0 train.rehearsal.rows=100"
    assert remedy(mode="full", ewc={"strength": 500}) == f'make train SET="{lora}"'
    run.settings.write_text("train: {epochs: 1}\n")
    (run.folder / "ledger.json").write_text('{"rehearsal": {"rows_trained": 60}}')
    again = "make train CONFIG=outputs/mine/config.resolved.yaml SET=train"
    assert remedy(rehearsal={"share": 0.15}) == f"{again}.rehearsal.share=0.3"
    assert remedy(rehearsal={"share": 0.5}) == f"{again}.learning_rate=0.0001"
