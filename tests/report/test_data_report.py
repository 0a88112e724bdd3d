"""The data report: its figures against rows counted by hand, and a page that names every row that was left out."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

import report_data
from sft.report import data_report


def row(question: str, answer: str) -> str:
    return json.dumps({"system": "", "user": question, "assistant": answer}) + "\n"


@pytest.fixture
def project(tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from sft.config.load import load
    from sft.data.process import process

    raw = [row(f"What is {i} + {i}?", f"It is {2 * i}.") for i in range(30)]
    raw += [row("Say <script>alert(1)</script> twice.", "word " * 90), row("What is 7 + 7?", "It is 14.")]
    raw += [row("And nothing?", ""), "{not json\n"]
    (tmp_path / "raw.jsonl").write_text("".join(raw), encoding="utf-8")
    data = "data: {raw_path: raw.jsonl, split: {train: 1, val: 0, test: 0}}"
    text = f"model: {{name: {tiny_qwen2}, max_seq_len: 64}}\n{data}\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    config = load(tmp_path / "c.yaml", [], root=tmp_path).config
    process(config.data, tmp_path)
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    return tmp_path


def report(root: Path, *sets: str, limit: int = 0, out: Path | None = None) -> Any:
    return report_data.main(
        argparse.Namespace(config=str(root / "c.yaml"), set=list(sets), limit=limit, out=out, json=True)
    )


def test_the_report_counts_what_the_files_contain(project: Path) -> None:
    result = report(project)
    assert result["rows"] == {"train": 31}
    assert result["ledger"]["named"] == {"unreadable": 1, "empty answer": 1, "exact duplicate": 1}
    assert result["duplicates"]["exact_dropped"] == 1
    run = result["tokens"]["run"]
    assert (run["rows_read"], run["rows_trained"], run["reasons"]) == (31, 30, {"over length": 1})
    assert result["tokens"]["by_role"]["assistant"]["count"] == 31
    assert [one["rows_over"] for one in result["tokens"]["limits"]] == [0, 0, 0, 0]
    assert 0 < result["tokens"]["labelled"]["share"] < 1
    assert ["it is 0.", 1] not in result["phrases"]["openings"]
    assert ["word word word word", 1] not in result["phrases"]["runs"]  # one row, however often it says it
    assert {reason: len(rows) for reason, rows in result["examples"].items()} == result["ledger"]["named"]

    page = (project / "outputs" / "reports" / "data.html").read_text(encoding="utf-8")
    for reason in result["ledger"]["named"]:
        assert f"{reason}: 1 rows" in page
    assert "{not json" in page and "raw.jsonl:34" in page and "over length" in page
    assert "<script>alert" not in page and page.count("<svg") >= 3
    assert not re.search(r"""(src|href)=["'](?!data:,|#)""", page) and "@import" not in page and "url(h" not in page
    assert len(ids := re.findall(r'\bid="([^"]+)"', page)) == len(set(ids))


def test_a_cut_row_loses_its_prompt_and_a_sample_is_announced(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = report(project, "model.over_length=truncate_right", limit=10, out=tmp_path / "here.html")
    assert result["sample"] == {"rows": 10, "of": 31, "seed": 42} and result["tokens"]["run"]["rows_read"] == 10
    assert (tmp_path / "here.html").is_file()
    output = capsys.readouterr()
    assert "of 31 rows (--limit 0" in output.out + output.err
    result["ledger"]["leaks"] = {"val": {"exact": 2, "near": None}, "test": {"exact": 0, "near": None}}
    result["tokens"], result["ledger"]["warnings"] = None, ["val is empty"]
    page = data_report.page(result, "Leaks")
    assert "2 of val (exact); not looked for: near" in page and "of test" not in page and "val is empty" in page
    none = report(project, "model.name=nobody/nothing-here")
    assert none["tokens"] is None and "no tokenizer" in capsys.readouterr().err


def test_a_sample_is_seeded_in_file_order_and_complete_without_a_limit() -> None:
    rows = [{"id": i} for i in range(100)]
    drawn, total = data_report.sample_rows(iter(rows), 10, 1)
    numbers = [one["id"] for one in drawn]
    assert total == 100 and len(set(numbers)) == 10 and numbers == sorted(numbers) and numbers != list(range(10))
    assert data_report.sample_rows(iter(rows), 10, 1)[0] == drawn and data_report.sample_rows(iter(rows), 0, 1) == (
        rows,
        100,
    )
