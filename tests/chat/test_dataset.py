"""Tokenised rows cached in Arrow: the same rows and ledger as without the cache, and nothing from a damaged entry."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from sft import files
from sft.chat import dataset
from sft.chat.dataset import RunLedger, Split, TokenisedRows, Tokeniser, fingerprint
from sft.chat.encode import Encoded
from sft.data import rows, store
from sft.errors import DataError
from sft.training import job
from tests.chat import words
from tests.chat.helpers import CHATML, encode_all, encoder_for, make_encoder
from tests.test_architecture import imports

QUESTIONS = ["Who are you?", "And you?", "Who?", "Be brief. Who are you now?"]


def row(number: int, **more: Any) -> dict[str, Any]:
    answer = "Ann. " * (number % 9 + 1)
    return {
        "id": f"r{number}",
        "system": "Be brief.",
        "user": f"{QUESTIONS[number % 4]} {number}",
        "assistant": answer,
        **more,
    }


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def plain_encoder(**more: Any) -> Any:
    return encoder_for("plain", words.tokenizer(), **{"max_seq_len": 44, "over_length": "drop", **more})


def start(encoder: Any, path: Path, cache: Path | None) -> Split:
    return Tokeniser(encoder, cache)(path, files.sha256(path))


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


@pytest.fixture
def some(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "train.jsonl", [row(number) for number in range(600)])


def test_cached_rows_are_those_that_encoding_gives(tmp_path: Path, some: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = plain_encoder()
    expected, ledger = encode_all(encoder, store.read_rows(some))
    features = [{"id": one.id, "input_ids": one.input_ids, "labels": one.labels} for one in expected]
    assert 250 < len(features) < 600 == ledger.rows_read and sum(map(len, ledger.dropped.values())) > 0
    encoded: list[int] = []
    encode = encoder.encode_batch
    monkeypatch.setattr(encoder, "encode_batch", lambda batch: encoded.append(len(batch)) or encode(batch))
    for cache, cached, rows_encoded in ((None, False, 600), (tmp_path / "c", False, 600), (tmp_path / "c", True, 0)):
        encoded.clear()
        split = start(encoder, some, cache)
        assert list(split.rows) == features and split.ledger == ledger and split.system == "Be brief."
        assert split.cached is cached and sum(encoded) == rows_encoded
    assert split.rows[-1] == features[-1] and split.rows[250:260] == features[250:260]
    assert split.rows.lengths().tolist() == [len(one["input_ids"]) for one in features]
    assert [f"{number:016x}" for number in split.rows.prompt_ids()[:3]] == [rows.prompt_id(row(n)) for n in range(3)]
    with pytest.raises(IndexError):
        split.rows[len(features)]


def test_every_module_that_encodes_rows_is_part_of_the_cache_key() -> None:
    package = Path(dataset.__file__).parents[1]
    hashed = {path for pattern in dataset.CODE for path in package.glob(pattern)}
    assert all(any(package.glob(pattern)) for pattern in dataset.CODE)
    waiting, reached = [package / "chat" / "seq2seq.py"], set()
    while waiting:
        path = waiting.pop()
        reached.add(path)
        names = [name.split(".")[1:] for name, _ in imports(path, top_only=True) if name.startswith("sft.")]
        files_of = [package.joinpath(*name).with_suffix(".py") for name in names]
        waiting += [file for file in files_of if file.is_file() and file not in reached]
    assert {path for path in reached if path.parent.name in ("chat", "data", "model")} <= hashed


def test_another_setting_template_tokenizer_or_file_is_another_entry(tmp_path: Path, some: Path) -> None:
    bare = encoder_for("plain", words.tokenizer(bos=None), max_seq_len=44, over_length="drop")
    other = encoder_for("vicuna", words.tokenizer(), max_seq_len=44, over_length="drop")
    changed = [
        plain_encoder(max_seq_len=45),
        plain_encoder(over_length="truncate_left"),
        plain_encoder(labels="last_assistant"),
        bare,
        other,
    ]
    assert len({fingerprint(encoder) for encoder in [plain_encoder(), *changed]}) == 6
    assert fingerprint(plain_encoder()) == fingerprint(plain_encoder())
    start(plain_encoder(), some, tmp_path / "c")
    assert not start(plain_encoder(max_seq_len=45), some, tmp_path / "c").cached
    more = write_jsonl(tmp_path / "more.jsonl", [row(number) for number in range(601)])
    assert start(plain_encoder(), more, tmp_path / "c").ledger.rows_read == 601
    assert start(plain_encoder(), some, tmp_path / "c").cached and len(list((tmp_path / "c").iterdir())) == 3


def _flip(entry: Path) -> None:
    content = bytearray((entry / "rows.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (entry / "rows.arrow").write_bytes(content)


def _cut(entry: Path) -> None:
    os.truncate(entry / "rows.arrow", 1_000)


def _unwritten(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def _not_arrow(entry: Path) -> None:
    (entry / "rows.arrow").write_bytes(b"not Arrow")
    files.write_manifest(entry)


@pytest.mark.parametrize("harm", [_flip, _cut, _unwritten, _not_arrow])
def test_a_damaged_entry_is_encoded_again_with_a_warning(
    tmp_path: Path, some: Path, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "c"
    expected = list(start(plain_encoder(), some, cache).rows)
    harm(entry_of(cache))
    with caplog.at_level(logging.WARNING, "sft.chat"):
        again = start(plain_encoder(), some, cache)
    assert not again.cached and list(again.rows) == expected and "cannot be used" in caplog.text
    assert start(plain_encoder(), some, cache).cached


def test_a_folder_that_cannot_be_written_caches_nothing_and_warns(
    tmp_path: Path, some: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c").write_text("a file")
    split = start(plain_encoder(), some, tmp_path / "c")
    assert len(split.rows) == split.ledger.rows_trained > 0 and "cannot be cached" in caplog.text


def test_warnings_repeat_at_every_start_and_old_entries_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    think = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<s>now' }}")
    assert think != CHATML
    path = write_jsonl(tmp_path / "train.jsonl", [row(1), row(2)])
    for _ in range(2):
        caplog.clear()
        split = start(make_encoder(think, words.tokenizer()), path, tmp_path / "c")
        assert [record.getMessage().count("the generation prompt differs") for record in caplog.records] == [1]
    assert split.cached
    monkeypatch.setattr(dataset, "MAX_ENTRIES", 2)
    first = entry_of(tmp_path / "c")
    os.utime(first, (1, 1))
    for limit in (50, 51):
        start(plain_encoder(max_seq_len=limit), path, tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2 and not first.exists()


def test_a_row_of_several_pieces_is_one_row_of_the_ledger() -> None:
    ledger = RunLedger()
    ledger.add(Encoded("a", [1, 2], [-100, 2]), Encoded("a", [1, 2, 3], [-100, 2, 3]))
    ledger.add(Encoded("b", [1, 2], [-100, 2]), Encoded("b", [], [], dropped="over length"))
    ledger.add(Encoded("c", [], [], dropped="over length"), Encoded("c", [], [], dropped="over length"))
    assert (ledger.rows_read, ledger.rows_trained, ledger.pieces, ledger.labelled_tokens) == (3, 2, 3, 4)
    assert ledger.dropped == {"over length": ["c"]} and ledger.pieces_dropped == {"over length": 1}
    assert any("2 rows split at their turns into 3 pieces" in message for message in ledger.sentences())
    rated = RunLedger()
    rated.add(*(Encoded("a", [1, 2, 3], [-100, 2, 3], chosen=2, rating=rating) for rating in (1, -1)))
    assert rated.sentences() == ["1 pairs: each answer counts as a row that is rated, 2 in all"]


def test_split_rows_are_cached_by_piece_and_each_answer_is_in_the_loss_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Ann. Bob."}]
    talks = [{"id": f"r{count}", "messages": turns * count} for count in (1, 3, 9)]
    path, encoder = (
        write_jsonl(tmp_path / "train.jsonl", talks),
        plain_encoder(max_seq_len=60, over_length="split_turns"),
    )
    for cached in (False, True):
        split = start(encoder, path, tmp_path / "c")
        names = [feature["id"] for feature in split.rows]
        assert (
            split.cached is cached
            and sorted(set(names)) == ["r1", "r3", "r9"]
            and len(names) == split.ledger.pieces > 3
        )
        assert (split.ledger.rows_read, split.ledger.rows_trained) == (3, 3)
        assert split.ledger.labelled_tokens == 13 * encoder.encode(talks[0]).labels.count(words.ID["</s>"]) * 7
        assert split.rows.lengths().max() <= 60


def test_a_run_reads_its_rows_and_warns_of_leaked_validation_questions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [row(number) for number in range(40)])
    held = [row(2, id="v0"), row(50, id="v1", references=["Bob.", "Ann."]), row(51, id="v2", assistant="Ann " * 90)]
    stage = store.Stage("given", train, write_jsonl(tmp_path / "val.jsonl", held), None)
    for _ in ("encoded", "from the cache"):
        split = job.read_rows(stage, plain_encoder(), answered=5, cache=tmp_path / "c")
        assert split.system == "Be brief." and split.leaks == 1
        assert [rows.row_id(row) for row in split.answer_rows] == ["v0", "v1"]
        assert rows.references(split.answer_rows[1]) == ["Bob.", "Ann."]
        assert split.ledger()["val"]["reasons"] == {"over length": 1} and "validation loss is optimistic" in caplog.text
        assert split.longest == max(len(one["input_ids"]) for one in split.train) and len(split.train) > 20
    assert len(TokenisedRows()) == 0 and list(TokenisedRows()) == []


def test_weights_are_cached_with_the_rows_and_a_key_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    content = [row(0, grade=0.5), row(1), row(2, grade=1), row(3, grade=0)]
    train = write_jsonl(tmp_path / "train.jsonl", content)
    stage, encoder = store.Stage("given", train, None, None), plain_encoder(max_seq_len=100, weight_field="grade")
    for _ in ("encoded", "from the cache"):
        split = job.read_rows(stage, encoder, answered=0, cache=tmp_path / "c")
        assert [set(one.get("weights", [])) for one in split.train] == [{0.5}, set(), set()]
        assert len(split.train[0]["weights"]) == len(split.train[0]["labels"])
        ledger = split.ledgers["train"]
        assert ledger.rows_weighted == 2 and ledger.dropped == {"its weight is 0": ["r3"]}
        assert "1 rows have no weight of their own (data.weight_field): each counts 1" in ledger.sentences()
    joined = split.train.joined([{"id": "x", "input_ids": [1, 2], "labels": [-100, 2]}])
    assert "weights" in joined[0] and "weights" not in joined[3]
    for name, fix in (("given", "a number under this key in its rows"), ("processed", "make process, which stores it")):
        with pytest.raises(DataError, match=r"no training row of train\.jsonl has the key 'mark'") as caught:
            stage = store.Stage(name, train, None, None)
            job.read_rows(stage, plain_encoder(weight_field="mark"), answered=0, cache=tmp_path / "c")
        assert str(caught.value.fix).startswith(fix)
