"""Benchmarks, flags, lengths and scripts of rows: reported, and dropped by config; and replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import ContaminationSection, DataSection, ReplaySection, SplitSection
from sft.data.process import process
from sft.data.quality import script_of
from sft.errors import DataError

ALL_TRAIN = SplitSection(train=1, val=0, test=0)
LONG = "a train leaves the old town at nine and meets another one at noon near the river bank on monday"


def put(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def qa(question: str, answer: str = "yes") -> dict[str, str]:
    return {"question": question, "answer": answer}


def run(root: Path, rows: list[Any], **data: Any) -> Any:
    raw = put(root / "raw.jsonl", rows)
    return process(DataSection(split=data.pop("split", ALL_TRAIN), **data), root, str(raw))


def train(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "data/processed/train.jsonl").read_bytes().splitlines()]


def test_rows_of_a_benchmark_are_named_and_are_no_faults(tmp_path: Path) -> None:
    put(tmp_path / "bench.jsonl", [qa(LONG, "4"), qa("Who wrote Faust?"), {"goal": "tie a knot well", "sol1": "x"}])
    rows = [
        qa("who wrote FAUST"),
        qa("Who wrote Faust and why?"),
        qa(f"Listen: {LONG.upper()}!"),
        qa("q", f"It says that {LONG}."),
        qa(" ".join(LONG.split()[:12])),
        qa("Tie a knot, well"),
        qa("other"),
    ]
    against = ContaminationSection(against=["bench.jsonl"])
    ledger = run(tmp_path, rows, contamination=against, max_dropped=0)
    assert ledger.named == {"contamination": 4} and ledger.faults == 0
    assert [row["user"] for row in train(tmp_path)] == [rows[1]["question"], rows[4]["question"], "other"]
    files = [{"name": "bench.jsonl", "rows": 3, "hits": 4}]
    assert ledger.reports["contamination"] == {"ngram": 13, "against": files}
    quarantine = (tmp_path / "data/processed/quarantine.jsonl").read_text()
    assert "has the question of bench.jsonl:2" in quarantine and "shares 13 words in a row" in quarantine
    with pytest.raises(DataError, match="no such file"):
        run(tmp_path, rows, contamination=ContaminationSection(against=["gone.jsonl"]))


def test_a_prompt_shared_by_all_benchmark_rows_is_not_contamination(tmp_path: Path) -> None:
    put(tmp_path / "bench.jsonl", [qa(f"{LONG} number {i}") for i in range(20)])
    ledger = run(tmp_path, [qa(f"{LONG} and more")], contamination=ContaminationSection(against=["bench.jsonl"]))
    assert ledger.named == {}


def test_gsm8k_train_holds_little_of_its_test(tmp_path: Path, shared: Path) -> None:
    against = ContaminationSection(against=[str(shared / "instruct/gsm8k_test.jsonl")])
    data = DataSection(contamination=against)
    ledger = process(data, tmp_path, str(shared / "instruct/gsm8k_train.jsonl"))
    assert ledger.balanced() and 0 < ledger.named["contamination"] < 150
    again = process(data, tmp_path, str(shared / "instruct/gsm8k_train.jsonl"))
    assert again.to_json() == ledger.to_json()


MARKED = [
    *[qa(f"question number {i} of all", "an answer of some length") for i in range(40)],
    qa("bell", "ding\x07"),
    qa("coffee", "in a caf\u00c3\u00a9"),
    qa("who are you?", "As an AI language model, I cannot say."),
    qa("sorry?", "I\u2019m sorry, but I can\u2019t help with that."),
    qa("\u043a\u0442\u043e \u0442\u044b", "\u044f \u0440\u043e\u0431\u043e\u0442 \u043d\u043e\u0432\u044b\u0439"),
    qa("long", "word " * 2_000),
]


def test_flagged_rows_are_reported_and_stay_by_default(tmp_path: Path) -> None:
    ledger = run(tmp_path, MARKED)
    report = ledger.to_json()
    assert ledger.written == 46 and ledger.named == {}
    assert report["quality"] == {
        "control_characters": 2,
        "placeholders": 0,
        "boilerplate": 2,
        "length_outliers": 1,
        "script": 1,
    }
    assert report["scripts"] == {"latin": 45, "cyrillic": 1}
    assert report["lengths"]["answers"] == {"p5": 13, "median": 24, "p95": 38, "longest": 10_000}
    assert report["balance"].startswith("lengths are uneven")
    assert ledger.report_lines()[0].endswith("control characters 2, boilerplate 2, length outliers 1, script 1")


def test_rows_of_numbers_are_in_no_other_script(tmp_path: Path) -> None:
    assert run(tmp_path, [qa(f"{i} + 1", str(i + 1)) for i in range(9)]).reports["quality"]["script"] == 0


def test_flagged_rows_are_dropped_by_config_and_are_no_faults(tmp_path: Path) -> None:
    drop = ["control_characters", "boilerplate", "length_outliers", "script"]
    ledger = run(tmp_path, MARKED, drop=drop, max_dropped=0)
    expected = {"control characters": 2, "boilerplate": 2, "length outlier": 1, "other script": 1}
    assert ledger.named == expected and ledger.written == 40 and ledger.faults == 0
    assert ledger.to_json()["quality"]["boilerplate"] == 2
    assert run(tmp_path, MARKED, drop=["boilerplate"]).named == {"boilerplate": 2}


def test_placeholders_that_nobody_filled_in_are_a_warning_and_can_be_left_out(tmp_path: Path) -> None:
    rows = [qa("who are you?", "I am {{name}}."), qa("and?", "Made by {{ author }}"), qa("code", "{{ x.y }} {% if %}")]
    ledger = run(tmp_path, rows)
    assert ledger.written == 3 and ledger.reports["quality"]["placeholders"] == 2
    assert any(
        "2 rows hold a placeholder such as {{name}} (the first: raw.jsonl:1)" in line for line in ledger.warnings
    )
    dropped = run(tmp_path, rows, drop=["placeholders"])
    assert dropped.named == {"placeholder": 2} and not any("{{name}}" in line for line in dropped.warnings)


def test_the_former_name_of_the_script_check_is_an_error_that_names_its_successor() -> None:
    with pytest.raises(ValueError, match="`language` is now `script`"):
        DataSection(drop=["language"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "text, script",
    [
        ("Hello", "latin"),
        ("caf\u00e9", "latin"),
        ("1 + 1", "none"),
        ("\u00bf?", "none"),
        ("\u4f60\u597d", "han"),
        ("\u4eca\u65e5\u306f\u5929\u6c17", "kana"),
        ("\uc548\ub155", "hangul"),
        ("\u0434\u0430 ok \u0434\u0430", "cyrillic"),
        ("\u0645\u0631\u062d\u0628\u0627", "arabic"),
    ],
)
def test_a_rows_script_is_that_of_most_letters(text: str, script: str) -> None:
    assert script_of(text) == script


def test_replay_is_a_share_of_the_mix_seeded_and_in_training_alone(tmp_path: Path) -> None:
    general = [qa(f"general {i}") for i in range(500)] + [{"text": f"Once upon a time, {i}."} for i in range(500)]
    put(tmp_path / "general.jsonl", [*general, qa("", ""), qa("own 3")])
    own = [qa(f"own {i}") for i in range(900)]
    replay = ReplaySection(path="general.jsonl", ratio=0.2)
    ledger = run(tmp_path, own, replay=replay, split=SplitSection())
    rows = train(tmp_path)
    mixed = [row for row in rows if row.get("replay")]
    assert len(mixed) == ledger.replayed == round((len(rows) - len(mixed)) / 4) and ledger.balanced()
    assert all(row["origin"].startswith("general.jsonl:") for row in mixed)
    assert {"user" in row for row in mixed} == {True, False} and not any(row.get("user") == "own 3" for row in mixed)
    assert next(row for row in mixed if "input" in row)["input"] == ""
    held = "".join((tmp_path / f"data/processed/{name}.jsonl").read_text() for name in ("val", "test"))
    assert "general" not in held and ledger.reports["replay"]["usable"] == 1_000
    run(tmp_path, own, replay=replay, split=SplitSection())
    assert train(tmp_path) == rows


def test_replay_has_no_question_of_val_or_test(tmp_path: Path) -> None:
    own = [qa(f"own question {i}") for i in range(300)]
    put(tmp_path / "general.jsonl", [qa(f"Own question {i}", "another answer") for i in range(300)])
    ledger = run(tmp_path, own, replay=ReplaySection(path="general.jsonl", ratio=0.45), split=SplitSection())
    assert ledger.reports["replay"]["usable"] == ledger.splits["train"] - ledger.replayed < 300
    assert ledger.reports["leaks"]["test"]["same question"] == 0


def test_replay_leaves_out_rows_of_train_without_deduplication_too(tmp_path: Path) -> None:
    own = [qa(f"own {i}") for i in range(60)]
    put(tmp_path / "general.jsonl", [*own, qa("general")])
    ledger = run(tmp_path, own + own[:1], replay=ReplaySection(path="general.jsonl", ratio=0.4), deduplicate=False)
    assert ledger.reports["replay"]["usable"] == ledger.replayed == 1 and ledger.written == 62


def test_too_little_replay_is_a_warning_and_none_an_error(tmp_path: Path) -> None:
    put(tmp_path / "general.jsonl", [qa("general")])
    ledger = run(tmp_path, [qa(f"own {i}") for i in range(90)], replay=ReplaySection(path="general.jsonl"))
    assert ledger.replayed == 1 and any("fewer than the 10" in line for line in ledger.warnings)
    put(tmp_path / "general.jsonl", [{"x": 1}])
    with pytest.raises(DataError, match="no usable row"):
        run(tmp_path, [qa("own")], replay=ReplaySection(path="general.jsonl"))


def test_rows_without_letters_are_no_other_script(tmp_path: Path) -> None:
    ledger = run(tmp_path, [{"question": i, "answer": i * 2} for i in range(9)])
    assert ledger.reports["quality"]["script"] == 0 and ledger.reports["scripts"] == {"none": 9}
