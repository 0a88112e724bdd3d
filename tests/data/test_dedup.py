"""Near duplicates are found, verified and stay in one split; groups by a key; leaks counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import DataSection, SplitSection
from sft.data.dedup import WORD, NearDuplicates
from sft.data.process import process

SPLITS = ("train", "val", "test")
rng = random.Random(3)
VOCABULARY = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(3_000)]


def text(words: int = 40) -> list[str]:
    return rng.choices(VOCABULARY, k=words)


def changed(words: list[str], *places: int) -> list[str]:
    return [f"new{number}" if number in places else word for number, word in enumerate(words)]


def run(root: Path, rows: list[dict[str, Any]], **data: Any) -> Any:
    raw = root / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return process(DataSection(**data), root, str(raw))


def qa(words: list[str], answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"question": " ".join(words), "answer": answer, **more}


def splits(root: Path) -> dict[str, str]:
    result = {}
    for name in SPLITS:
        path = root / f"data/processed/{name}.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else []:
            result[json.loads(line)["user"]] = name
    return result


def shingles(text: str) -> set[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    length = max(1, min(5, len(words)))
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_the_pairs_are_exactly_those_of_a_brute_force_search(threshold: float) -> None:
    bases = [text(random.Random(seed).randint(3, 60)) for seed in range(60)]
    texts = [" ".join(base) for base in bases]
    for seed, base in enumerate(bases):
        pick = random.Random(seed)
        texts += [" ".join(changed(base, *pick.sample(range(len(base)), k=count))) for count in (0, 1, 2)]
    texts += ["", "!", "\u6211\u4eec\u8981\u8bad\u7ec3\u6a21\u578b", "\u6211\u4eec\u8981\u8bad\u7ec3\u6a21\u578b\u3002"]
    index = NearDuplicates(threshold)
    for one in texts:
        index.add(one)
    sets = [shingles(one) for one in texts]
    expected = {
        (later, earlier)
        for later in range(len(texts))
        for earlier in range(later)
        if len(sets[later] & sets[earlier]) >= threshold * len(sets[later] | sets[earlier])
    }
    assert set(index.pairs()) == expected and len(expected) > 60


def test_hundreds_of_equal_rows_are_one_cluster(tmp_path: Path) -> None:
    base = text(100)
    rows = [qa(changed(base, number % 100), str(number)) for number in range(400)]
    ledger = run(tmp_path, rows, near_duplicates="report", split=SplitSection(train=0.5, val=0.5, test=0))
    result = ledger.reports["near_duplicates"]
    assert result["rows_in_clusters"] == 400
    assert sorted(ledger.splits.values()) == [0, 400]
    assert any("is empty" in line for line in ledger.warnings)


def test_drop_leaves_the_first_of_each_and_off_does_not_search(tmp_path: Path) -> None:
    bases = [text() for _ in range(50)]
    rows = [qa(base) for base in bases] + [qa(changed(base, 0)) for base in bases[:20]]
    ledger = run(tmp_path, rows, near_duplicates="drop", max_dropped=0)
    assert ledger.named == {"near duplicate": 20} and ledger.written == 50 and ledger.faults == 0
    quarantine = (tmp_path / "data/processed/quarantine.jsonl").read_text().splitlines()
    entry = json.loads(quarantine[0])
    assert entry["origin"] == "raw.jsonl:51" and entry["row"]["user"].startswith("new0 ")
    assert set(splits(tmp_path)) == {" ".join(base) for base in bases}
    ledger = run(tmp_path, rows)
    assert ledger.written == 70 and "near_duplicates" not in ledger.reports


def test_no_cluster_crosses_splits_and_appended_rows_move_nothing(tmp_path: Path) -> None:
    bases = [text() for _ in range(120)]
    rows = [qa(base) for base in bases] + [qa(changed(base, 0)) for base in bases]
    run(tmp_path, rows, near_duplicates="report")
    before = splits(tmp_path)
    for base in bases:
        assert before[" ".join(base)] == before[" ".join(changed(base, 0))]
    assert set(before.values()) == set(SPLITS)
    train = next(base for base in bases if before[" ".join(base)] == "train")
    test = next(base for base in bases if before[" ".join(base)] == "test")
    long = [*train, *test]
    more = [qa(text()) for _ in range(30)] + [qa(changed(base, 39)) for base in bases[:9]]
    ledger = run(tmp_path, [*rows, *more, qa(long)], near_duplicates="report", near_duplicate_threshold=0.45)
    after = splits(tmp_path)
    assert {user: after[user] for user in before} == before
    assert ledger.named == {"leak into val or test": 1} and " ".join(long) not in after


def test_rows_are_grouped_by_a_key(tmp_path: Path) -> None:
    rows = [qa(text(), page=number % 60) for number in range(300)] + [qa(text())]
    ledger = run(tmp_path, rows, split=SplitSection(group_by="page"))
    result = splits(tmp_path)
    for page in range(60):
        assert len({result[row["question"]] for row in rows if row.get("page") == page}) == 1
    assert set(result.values()) == set(SPLITS)
    assert ledger.reports["groups"] == {"by": "page", "groups": 60, "without": 1}
    ledger = run(tmp_path, rows, split=SplitSection(group_by="pgae"))
    assert any("no row has the key" in line for line in ledger.warnings)


def test_a_group_is_not_divided_to_fill_an_empty_split(tmp_path: Path) -> None:
    ledger = run(tmp_path, [qa(text(), page=1) for _ in range(6)], split=SplitSection(group_by="page"))
    assert sorted(ledger.splits.values()) == [0, 0, 6]


def homes_of_questions(folder: Path) -> dict[str, set[str]]:
    homes: dict[str, set[str]] = {}
    for name in SPLITS:
        for line in (folder / f"data/processed/{name}.jsonl").read_text().splitlines():
            homes.setdefault(" ".join(json.loads(line)["user"].lower().split()), set()).add(name)
    return homes


@pytest.mark.parametrize("near", ["off", "report"])
def test_rows_with_the_same_question_share_a_split(tmp_path: Path, near: str) -> None:
    questions = [f"What  is the capital of land {number % 100}?" for number in range(300)]
    rows = [
        {**qa([ask if n % 2 else ask.upper()], str(n)), "system": f"style {n % 3}"} for n, ask in enumerate(questions)
    ]
    ledger = run(tmp_path, rows, near_duplicates=near, near_duplicate_threshold=0.95)
    result = homes_of_questions(tmp_path)
    assert len(result) == 100 and all(len(names) == 1 for names in result.values())
    assert set().union(*result.values()) == set(SPLITS)
    assert ledger.written == 300 and not any("occur in train" in line for line in ledger.warnings)
    none = {"exact": 0, "same question": 0, "near": None if near == "off" else 0}
    assert ledger.reports["leaks"] == {"val": none, "test": none}


def test_a_question_that_all_rows_share_leaves_splits_empty_with_a_warning(tmp_path: Path) -> None:
    ledger = run(tmp_path, [qa(["Tell me a joke about animals."], f"joke {number}") for number in range(300)])
    assert sorted(ledger.splits.values()) == [0, 0, 300] and sum("is empty" in line for line in ledger.warnings) == 2
    assert any("of the rows, not" in line and "data.split.group_by" in line for line in ledger.warnings)
    rows = [qa(["Tell me a joke about animals."], f"joke {number}", number=number) for number in range(300)]
    ledger = run(tmp_path, rows, split=SplitSection(group_by="number"))
    assert min(ledger.splits.values()) > 15 and ledger.reports["leaks"]["val"]["same question"] == ledger.splits["val"]
    assert any("also occur in train" in line for line in ledger.warnings)


def test_the_system_text_counts_with_a_short_question(tmp_path: Path) -> None:
    run(tmp_path, [{**qa(["Go on."]), "system": f"text {number}"} for number in range(300)])
    assert set(homes_of_questions(tmp_path)["go on."]) == set(SPLITS)
