"""From a raw file to the processed folder: exact counts, exact files, no partial results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import ColumnsSection, DataSection, SplitSection
from sft.data.process import Rejected, process
from sft.data.rows import prompt_id
from sft.data.split import choose_split, position
from sft.errors import DataError

ALL_TRAIN = SplitSection(train=1, val=0, test=0)


def qa(question: Any, answer: Any = "yes", **more: Any) -> str:
    return json.dumps({"question": question, "answer": answer, **more})


def roles(*names: str) -> str:
    return json.dumps({"messages": [{"role": name, "content": name} for name in names]})


# Every kind of bad row, each line with the reason that the ledger must give it; None for rows that are written.
BAD_ROWS: list[tuple[str, str | None]] = [
    (qa("good 1"), None),
    ('{"question": "cut', "unreadable"),
    ('{"question": "q", "answer": NaN}', "unreadable"),
    ('{"question": "q", "question": "q", "answer": "a"}', "unreadable"),
    ('{"question": "\\ud83d", "answer": "a"}', "unreadable"),
    ("[" * 100_000 + "]" * 100_000, "unreadable"),
    ('{"question": "q", "answer": ' + "1" * 5_000 + "}", "unreadable"),
    ("<<<<<<< HEAD", "unreadable"),
    ('["q", "a"]', "unknown format"),
    ('{"title": "t", "body": "b"}', "unknown format"),
    (qa({"nested": 1}), "not text"),
    (roles("system", "assistant"), "no user turn"),
    (qa("", "a"), "no user turn"),
    (qa("q", ""), "empty answer"),
    ('{"question": "only"}', "empty answer"),
    (roles("user", "assistant", "user"), "empty answer"),
    (roles("user", "wizard"), "unknown role"),
    (roles("user", "user", "assistant"), "roles out of order"),
    (roles("user", "assistant", "assistant"), "roles out of order"),
    (qa("good 1"), "exact duplicate"),
    (json.dumps({"prompt": "good 1", "completion": "yes"}), "exact duplicate"),
    (qa("good\u20282"), None),
    (roles("system", "user", "assistant", "user", "assistant"), None),
    (json.dumps({"input": "x", "target": "y"}), None),
]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def test_every_kind_of_bad_row_is_counted_and_quarantined_with_its_line(tmp_path: Path) -> None:
    raw = write(tmp_path / "bad.jsonl", [line for line, _ in BAD_ROWS])
    ledger = process(DataSection(max_dropped=1, split=ALL_TRAIN), tmp_path, str(raw))
    assert ledger.named == {
        "unreadable": 7,
        "unknown format": 2,
        "not text": 1,
        "no user turn": 2,
        "empty answer": 3,
        "unknown role": 1,
        "roles out of order": 2,
        "exact duplicate": 2,
    }
    assert (ledger.read, ledger.written, ledger.faults) == (24, 4, 18)
    out = tmp_path / "data/processed"
    assert sorted(path.name for path in out.iterdir()) == ["ledger.json", "quarantine.jsonl", "train.jsonl"]
    assert [row["origin"] for row in rows_of(out / "train.jsonl")] == [
        f"bad.jsonl:{number}" for number, (_, reason) in enumerate(BAD_ROWS, 1) if reason is None
    ]
    quarantine = rows_of(out / "quarantine.jsonl")
    assert [(row["origin"], row["reason"]) for row in quarantine] == [
        (f"bad.jsonl:{number}", reason) for number, (_, reason) in enumerate(BAD_ROWS, 1) if reason
    ]
    assert all(row["detail"] and ("row" in row) != ("text" in row) for row in quarantine)
    assert next(row for row in quarantine if row["reason"] == "not text")["row"]["question"] == {"nested": 1}
    account = json.loads((out / "ledger.json").read_text())
    assert (
        account["rows_read"]
        == account["rows_written"] + account["rows_named"]
        == account["rows_written"] + sum(account["named"].values())
    )
    assert account["formats"] == {"qa": 2, "messages": 1, "rendered": 1} and account["splits"] == {"train": 4}
    assert account["shapes"] == {"one turn": 2, "messages": 1, "rendered": 1} and account["accepted"] is True


def test_the_threshold_counts_faults_and_never_duplicates(tmp_path: Path) -> None:
    lines = [qa(f"q{i}") for i in range(18)] + [qa("", "")] * 2
    raw = write(tmp_path / "a.jsonl", lines + [qa("q0")] * 20)
    assert process(DataSection(max_dropped=0.05), tmp_path, str(raw)).fault_share == 0.05
    with pytest.raises(Rejected, match=r"2 of 40 rows are faulty .*more than data.max_dropped=0.04"):
        process(DataSection(max_dropped=0.04), tmp_path, str(raw))


def test_a_few_faults_are_accepted_in_a_small_file_unless_max_dropped_is_set(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", [qa(f"q{i}") for i in range(4)] + [qa("", "")])
    assert process(DataSection(), tmp_path, str(raw)).fault_share == 0.2
    with pytest.raises(Rejected, match="1 of 5 rows"):
        process(DataSection(max_dropped=0.1), tmp_path, str(raw))
    raw = write(tmp_path / "a.jsonl", [qa(f"q{i}") for i in range(14)] + [qa("", "")] * 4)
    with pytest.raises(Rejected, match="4 of 18 rows"):
        process(DataSection(), tmp_path, str(raw))


def test_the_same_rows_in_several_files_of_a_folder_are_no_faults(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("a", "b", "c"):
        write(tmp_path / "raw" / f"{name}.jsonl", [qa(f"q{i}") for i in range(9)])
    ledger = process(DataSection(max_dropped=0), tmp_path, str(tmp_path / "raw"))
    assert (ledger.written, ledger.faults, ledger.named) == (9, 0, {"exact duplicate": 18})


def test_an_empty_turn_at_the_end_is_left_out_and_counted(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    open_end, empty = {"role": "user", "content": " "}, {"role": "assistant", "content": ""}
    rows = [[*turns, open_end], [*turns[:3], empty], [*turns[:2], open_end], [turns[0], empty]]
    lines = [json.dumps({"messages": row}) for row in rows]
    ledger = process(DataSection(split=ALL_TRAIN), tmp_path, str(write(tmp_path / "a.jsonl", lines)))
    whole, short, *_ = rows_of(tmp_path / "data/processed/train.jsonl")
    assert whole["messages"] == turns
    assert (short["user"], short["assistant"]) == ("user", "assistant")
    assert ledger.written == 2 and ledger.named == {"empty answer": 1, "exact duplicate": 1}
    assert "3 rows ended with an empty turn: it was left out" in ledger.warnings


def test_fixes_that_cannot_help_are_not_offered(tmp_path: Path) -> None:
    def fix(*lines: str) -> str:
        with pytest.raises(Rejected) as caught:
            process(DataSection(), tmp_path, str(write(tmp_path / "a.jsonl", list(lines))))
        return str(caught.value.fix)

    good = [qa(f"q{i}") for i in range(20)]
    assert fix(*good, *[qa("")] * 5).endswith(f"make process RAW={tmp_path / 'a.jsonl'} SET=data.max_dropped=0.2")
    assert "max_dropped" not in fix(*good[:2], *[qa("")] * 5)
    table = fix(*[json.dumps({"Titel": f"Titel {i}", "Langer Text": "ein Text", "n": 1}) for i in range(9)])
    assert f"make process RAW={tmp_path / 'a.jsonl'} USER_COL=Titel ANSWER_COL='Langer Text'" in table
    for row in ({"chosen": "a", "rejected": "b"}, {"tree": {"text": "q", "replies": []}}, {"input_ids": [1, 2]}):
        assert "_COL" not in (text := fix(json.dumps(row))) and "max_dropped" not in text
    for row in (
        {"uuid": "0", "name": "chat", "messages_of": [{"text": "q"}]},
        {"type": "message", "user": "U02A", "text": "hello all", "ts": "1.0"},
    ):
        assert "_COL" not in fix(*[json.dumps({**row, "n": i}) for i in range(9)])
    no_header = "What is it?,A cat.\n" + "".join(f"What is {i}?,A dog.\n" for i in range(9))
    (tmp_path / "a.csv").write_text(no_header)
    with pytest.raises(Rejected) as caught:
        process(DataSection(), tmp_path, str(tmp_path / "a.csv"))
    assert str(caught.value.fix).startswith("if line 1 is a row, write names above it") and caught.value.table is None


def test_openassistant_messages_become_the_best_ranked_path_of_each_tree(tmp_path: Path) -> None:
    def message(name: str, parent: str | None, text: str, rank: int | None = None, **more: Any) -> str:
        role = "prompter" if text.endswith("?") else "assistant"
        row = {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en"}
        return json.dumps({**row, **more})

    lines = [
        message("b", "a", "worse", 1),
        message("a", None, "one?"),
        message("c", "a", "best", 0),
        message("d", "a", "deleted", -1, deleted=True),
        message("e", "c", "and?"),
        message("f", "e", "so"),
        message("g", "f", "unanswered?"),
        message("lost", "nobody", "reply"),
        message("x", "y", "parents in a circle"),
        message("y", "x", "parents in a circle"),
        message("None", None, "a first message is no reply to one called None?"),
    ]
    ledger = process(DataSection(max_dropped=1, split=ALL_TRAIN), tmp_path, str(write(tmp_path / "a.jsonl", lines)))
    assert (ledger.read, ledger.written, ledger.named) == (5, 1, {"unknown format": 3, "empty answer": 1})
    detail = "a message that no first message leads to: its parent is 'nobody'"
    assert ledger.examples["unknown format"][0]["detail"] == detail
    (row,) = rows_of(tmp_path / "data/processed/train.jsonl")
    assert row["origin"] == "a.jsonl:2"
    assert [turn["content"] for turn in row["messages"]] == ["one?", "best", "and?", "so"]
    assert any("holds 11 OpenAssistant messages" in line for line in ledger.warnings)


def test_a_rejected_run_changes_nothing_and_leaves_the_rows_to_read(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [qa(f"q{i}") for i in range(30)])
    process(DataSection(), tmp_path, str(good))
    out = tmp_path / "data/processed"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    bad = write(tmp_path / "bad.jsonl", ['{"title": 1}', "{", qa("q")])
    with pytest.raises(Rejected) as caught:
        process(DataSection(), tmp_path, str(bad))
    assert "data/processed/rejected.jsonl" in str(caught.value.where) and caught.value.ledger.read == 3
    assert [row["reason"] for row in rows_of(out / "rejected.jsonl")] == ["unknown format", "unreadable"]
    (out / "rejected.jsonl").rename(tmp_path / "r")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(Rejected, match="nothing is left"):
        process(DataSection(max_dropped=1), tmp_path, str(write(tmp_path / "none.jsonl", ["{"])))
    process(DataSection(), tmp_path, str(good))
    assert not (out / "rejected.jsonl").exists()


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", [qa(f"q{i}") for i in range(200)] + ["{"])
    process(DataSection(), tmp_path, str(raw))
    first = {path.name: path.read_bytes() for path in (tmp_path / "data/processed").iterdir()}
    process(DataSection(), tmp_path, str(raw))
    assert {path.name: path.read_bytes() for path in (tmp_path / "data/processed").iterdir()} == first


def test_appended_rows_move_no_other_row(tmp_path: Path) -> None:
    def splits(count: int, seed: int = 42) -> dict[str, str]:
        raw = write(tmp_path / "a.jsonl", [qa(f"q{i}") for i in range(count)])
        process(DataSection(split=SplitSection(seed=seed)), tmp_path, str(raw))
        folder = tmp_path / "data/processed"
        return {row["user"]: name for name in ("train", "val", "test") for row in rows_of(folder / f"{name}.jsonl")}

    small, large, other = splits(300), splits(900), splits(300, seed=7)
    assert len(small) == 300 and len(large) == 900
    assert {user: large[user] for user in small} == small
    assert other != small
    counts = [list(large.values()).count(name) for name in ("train", "val", "test")]
    assert 670 <= counts[0] <= 770 and min(counts) >= 60


def test_a_position_is_the_same_on_every_machine_and_version() -> None:
    assert position("0123456789abcdef", 42) == 0.7028428567059187
    assert choose_split("0123456789abcdef", SplitSection()) == "train"
    assert choose_split("0123456789abcdef", SplitSection(train=0.5, val=0.5, test=0)) == "val"


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_no_split_stays_empty_without_a_warning(tmp_path: Path, count: int) -> None:
    raw = write(tmp_path / "a.jsonl", [qa(f"{count} {i}") for i in range(count)])
    ledger = process(DataSection(), tmp_path, str(raw))
    folder = tmp_path / "data/processed"
    users_of = {name: [row["user"] for row in rows_of(folder / f"{name}.jsonl")] for name in ("train", "val", "test")}
    assert {name: len(users) for name, users in users_of.items()} == ledger.splits
    assert min(ledger.splits.values()) >= 1 and sum(ledger.splits.values()) == count
    assert sorted(user for users in users_of.values() for user in users) == sorted(f"{count} {i}" for i in range(count))
    moved = [
        name
        for name in ("train", "val", "test")
        if any(text.startswith(f"{name} would be empty") for text in ledger.warnings)
    ]
    natural = [
        choose_split(prompt_id(row), SplitSection()) for name in users_of for row in rows_of(folder / f"{name}.jsonl")
    ]
    assert set(moved) == {"train", "val", "test"} - set(natural)


def test_too_few_rows_for_three_splits_give_a_warning(tmp_path: Path) -> None:
    ledger = process(DataSection(), tmp_path, str(write(tmp_path / "a.jsonl", [qa("one")])))
    assert sum("is empty: 1 rows are too few to split" in text for text in ledger.warnings) == 2
    assert ledger.splits == {"train": 1, "val": 0, "test": 0}
    assert len([path for path in (tmp_path / "data/processed").glob("*.jsonl") if path.name != "quarantine.jsonl"]) == 1


def test_deduplicate_false_leaves_duplicates(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", [qa("same")] * 3)
    assert process(DataSection(deduplicate=False), tmp_path, str(raw)).written == 3
    assert process(DataSection(), tmp_path, str(raw)).named == {"exact duplicate": 2}


def test_foreign_files_survive_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", [qa(f"q{i}") for i in range(5)])
    (tmp_path / "data/processed").mkdir(parents=True)
    (tmp_path / "data/processed/notes.txt").write_text("mine")
    process(DataSection(), tmp_path, str(raw))
    assert (tmp_path / "data/processed/notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match="holds another folder, processed"):
        process(DataSection(processed_dir="data"), tmp_path, str(raw))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        process(DataSection(processed_dir="file"), tmp_path, str(raw))


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", [qa("q")])
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        process(DataSection(processed_dir="file/below"), tmp_path, str(raw))


EXPECTED = {  # rows read, faults; the rest are written or duplicates
    "instruct/alpaca_52k.json": (52_002, 33),
    "instruct/alpaca_en_demo.json": (999, 0),
    "instruct/alpaca_zh_demo.json": (1_000, 0),
    "instruct/identity.json": (91, 0),
    "instruct/glaive_toolcall_en_demo.json": (300, 0),
    "instruct/reason_tool_use_demo_50.jsonl": (50, 0),
    "instruct/gsm8k_train.jsonl": (7_473, 0),
    "instruct/gsm8k_test.jsonl": (1_319, 0),
    "chat/sharegpt_dummy.json": (500, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_ledger_of_real_files_balances(tmp_path: Path, shared: Path, name: str) -> None:
    ledger = process(DataSection(), tmp_path, str(shared / name))
    assert (ledger.read, ledger.faults) == EXPECTED[name]
    written = sum(
        (tmp_path / f"data/processed/{split}.jsonl").read_bytes().count(b"\n") for split in ("train", "val", "test")
    )
    quarantined = len(rows_of(tmp_path / "data/processed/quarantine.jsonl"))
    assert written == ledger.written and ledger.read == written + quarantined


def test_truthfulqa_needs_its_columns_named(tmp_path: Path, shared: Path) -> None:
    raw = str(shared / "instruct/truthfulqa.csv")
    with pytest.raises(Rejected) as caught:
        process(DataSection(), tmp_path, raw)
    assert f"make process RAW={raw} USER_COL=Question ANSWER_COL='Best Answer'" in str(caught.value.fix)
    columns = ColumnsSection(user="Question", assistant="Best Answer")
    ledger = process(DataSection(columns=columns), tmp_path, raw)
    assert (ledger.read, ledger.written, ledger.formats) == (817, 817, {"columns": 817})


def test_processing_never_loads_torch_or_transformers(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", [qa(f"q{i}") for i in range(9)])
    code = (
        "import sys; from pathlib import Path; from sft.config.schema import DataSection;"
        "from sft.data.process import process; from sft.data import store, style;"
        f"root = Path({str(tmp_path)!r}); process(DataSection(), root, {str(raw)!r});"
        "style.style_folder(DataSection(), root, 'x', 'fill');"
        "store.read_rows(store.resolve_stage(DataSection(), root).train);"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    scripts = str(Path(__file__).resolve().parents[2] / "scripts")
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": scripts}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_rows_left_out_on_request_are_not_called_faulty(tmp_path: Path) -> None:
    rows = [json.dumps({"question": "Hi {{name}}, %d?" % n, "answer": f"Yes {n}."}) for n in range(4)]  # noqa: UP031
    data = DataSection(drop=["placeholders"])
    with pytest.raises(DataError, match=r"all 4 rows are left out \(4 placeholder\)") as caught:
        process(data, tmp_path, str(write(tmp_path / "a.jsonl", rows)))
    assert "change data.drop" in (caught.value.fix or "")


def test_a_column_that_is_not_in_the_file_gets_the_command_with_a_guess(tmp_path: Path) -> None:
    rows = [json.dumps({"question": f"{n}?", "anwser": f"Yes {n}."}) for n in range(4)]
    data = DataSection.model_validate({"columns": {"user": "question", "assistant": "answer"}})
    with pytest.raises(DataError) as caught:
        process(data, tmp_path, str(write(tmp_path / "a.jsonl", rows)))
    assert "USER_COL=question ANSWER_COL=anwser" in (caught.value.fix or "")
