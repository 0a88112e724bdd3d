"""Rows that come as tokens: the same as those that encoding their texts gives, mapped where nothing changes."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from sft.chat.dataset import Split, Tokeniser
from sft.data import shards, store
from sft.errors import DataError
from tests.chat import words
from tests.chat.helpers import encode_all, encoder_for

QUESTIONS = ["Who are you?", "And you?", "Who?"]
ROWS = [{"id": f"r{n}", "user": QUESTIONS[n % 3], "assistant": "Ann. " * (n % 5 + 1)} for n in range(40)]


def plain_encoder(**more: Any) -> Any:
    return encoder_for("plain", words.tokenizer(), **{"max_seq_len": 100, **more})


def tokens(encoder: Any) -> dict[str, list[Any]]:
    encoded, _ = encode_all(encoder, ROWS)
    columns = {"input_ids": [one.input_ids for one in encoded], "labels": [one.labels for one in encoded]}
    return columns | {"mask": [[int(label != -100) for label in row] for row in columns["labels"]]}


def write(path: Path, columns: dict[str, Any], *, stream: bool = True, **options: Any) -> Path:
    """One file: Parquet by its name, else Arrow as `datasets.save_to_disk` writes it, in batches of 16 rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return path
    new = ipc.new_stream if stream else ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, **options) as out:
        out.write_table(table, max_chunksize=16)
    return path


def start(encoder: Any, path: Path, cache: Path | None = None) -> Split:
    return Tokeniser(encoder, cache)(path, shards.digest(path))


def pairs(rows: Any) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in rows]


def test_arrow_rows_are_used_where_they_lie(tmp_path: Path) -> None:
    encoder, folder = plain_encoder(), tmp_path / "train"
    columns = tokens(encoder)
    first, second = ({k: columns[k][part] for k in ("input_ids", "labels")} for part in (slice(30), slice(30, None)))
    write(folder / "data-00000-of-00002.arrow", first)
    write(folder / "data-00001-of-00002.arrow", second, stream=False)
    (folder / "state.json").write_text("{}")
    expected = list(zip(columns["input_ids"], columns["labels"], strict=True))
    for cached in (False, True):
        split = start(encoder, folder, tmp_path / "cache")
        assert split.cached is cached and pairs(split.rows) == expected
    assert split.rows[31]["id"] == "data-00001-of-00002.arrow[1]"
    assert split.rows.lengths().tolist() == [len(ids) for ids in columns["input_ids"]]
    labels = [labels.tolist() for labels, _ in split.rows.labels()]
    assert list(chain(*labels)) == list(chain(*columns["labels"])) and len(labels) == 3
    ledger = split.ledger
    assert (ledger.rows_read, ledger.rows_trained, ledger.tokens) == (40, 40, sum(map(len, columns["input_ids"])))
    assert ledger.labelled_tokens == sum(map(sum, columns["mask"]))
    (entry,) = (tmp_path / "cache").iterdir()
    cached_columns = set(ipc.open_file(str(entry / "rows.arrow")).schema.names)
    assert "prompt_id" in cached_columns and not cached_columns & {"input_ids", "labels"}  # no copy of the tokens
    prompts = split.rows.prompt_ids().tolist()
    assert len(set(prompts)) == 3 and prompts[:5] == prompts[3:8]  # as many as there are questions
    write(folder / "data-00001-of-00002.arrow", first)
    assert len(start(encoder, folder, tmp_path / "cache").rows) == 60


@pytest.mark.parametrize("kind", ["parquet", "compressed", "mask", "padding", "types", "int64"])
def test_other_forms_give_the_same_rows(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = plain_encoder()
    columns = tokens(encoder)
    expected = list(zip(columns["input_ids"], columns["labels"], strict=True))
    mask = columns.pop("mask")
    if kind == "mask":
        columns = {"input_ids": columns["input_ids"], "completion_mask": mask}
    if kind == "padding":
        longest = max(map(len, mask))
        columns["attention_mask"] = [[1] * len(row) + [0] * (longest - len(row)) for row in mask]
        for name, filler in (("input_ids", 0), ("labels", -100)):
            columns[name] = [row + [filler] * (longest - len(row)) for row in columns[name]]
    if kind == "compressed":
        write(tmp_path / "train.arrow", columns, options=ipc.IpcWriteOptions(compression="lz4"))
    elif kind == "types":
        write(tmp_path / "train/a.arrow", {name: rows[:9] for name, rows in columns.items()})
        narrow = {name: pa.array(rows[9:], pa.list_(pa.int32())) for name, rows in columns.items()}
        write(tmp_path / "train/b.arrow", narrow)
    elif kind == "int64":
        columns["input_ids"] = pa.array(columns["input_ids"], pa.large_list(pa.uint16()))
        write(tmp_path / "train.arrow", columns)
    else:
        write(tmp_path / f"train.{'parquet' if kind == 'parquet' else 'arrow'}", columns)
    (path,) = tmp_path.iterdir()
    with caplog.at_level("INFO", "sft"):
        assert pairs(start(encoder, path).rows) == expected
    how = {"mask": "completion_mask", "padding": "padding is removed", "types": "types", "int64": "used where they are"}
    assert how.get(kind, "cannot be memory-mapped") in caplog.text


@pytest.mark.parametrize("policy", ["drop", "truncate_left", "truncate_right"])
def test_long_rows_are_cut_as_texts_are(tmp_path: Path, policy: str) -> None:
    path = write(tmp_path / "train.arrow", {k: v for k, v in tokens(plain_encoder()).items() if k != "mask"})
    limit = sorted(len(row) for row in tokens(plain_encoder())["input_ids"])[30]
    encoder = plain_encoder(max_seq_len=limit, over_length=policy)
    expected, ledger = encode_all(encoder, ROWS)
    split = start(encoder, path)
    assert pairs(split.rows) == [(one.input_ids, one.labels) for one in expected]
    assert split.ledger.tokens_truncated == ledger.tokens_truncated
    assert {reason: len(ids) for reason, ids in split.ledger.dropped.items()} == {
        reason: len(ids) for reason, ids in ledger.dropped.items()
    }
    assert ledger.dropped or ledger.tokens_truncated


def test_sources_and_targets_of_an_encoder_decoder(tmp_path: Path) -> None:
    encoder = plain_encoder(kind="seq2seq")
    columns = {name: rows for name, rows in tokens(encoder).items() if name != "mask"}
    longest = max(map(len, columns["labels"]))
    padded = [row + [-100] * (longest - len(row)) for row in columns["labels"]]
    path = write(tmp_path / "train.arrow", columns | {"labels": padded})
    assert pairs(start(encoder, path).rows) == list(zip(columns["input_ids"], columns["labels"], strict=True))
    write(path, columns | {"labels": [[99_999]] * 40})
    with pytest.raises(DataError, match="the label 99999 cannot be right: the tokenizer has"):
        start(encoder, path)


@pytest.mark.parametrize("limit", [100, 4])
def test_weights_of_labels_are_used(tmp_path: Path, limit: int) -> None:
    columns = {"input_ids": [[5, 6, 7], [5, 6, 7, 8, 9]], "labels": [[-100, 6, 7], [-100, -100, 7, 8, 9]]}
    weights = [[1.0, 0.5, 0.0], [1.0, 1.0, 2.0, 0.25, 1.0]]
    path = write(tmp_path / "train.arrow", columns | {"weights": pa.array(weights, pa.list_(pa.float32()))})
    rows = start(plain_encoder(max_seq_len=limit, over_length="truncate_right"), path).rows
    assert [row["weights"] for row in rows] == [weights[0], weights[1][:limit]]


def test_a_row_without_a_label_is_dropped_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.arrow", {"input_ids": [[5, 6], [5, 6]], "labels": [[-100, -100], [-100, 6]]})
    split = start(plain_encoder(), path)
    assert split.ledger.dropped == {"no label left": ["train.arrow[0]"]} and split.rows[0]["id"] == "train.arrow[1]"


def test_tokens_alone_need_labels_all_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "train.arrow", {"input_ids": [[5, 6, 7]]})
    assert pairs(start(plain_encoder(labels="all_tokens"), path).rows) == [([5, 6, 7], [5, 6, 7])]
    with pytest.raises(DataError, match="no column says where a loss is taken") as raised:
        start(plain_encoder(), path)
    assert "train.labels=all_tokens" in str(raised.value.fix)


@pytest.mark.parametrize(
    ("columns", "message", "row"),
    [
        ({"input_ids": [[5, 6], [5, 99_999]], "labels": [[5, 6], [5, 99_999]]}, "the token 99999 cannot be right", 1),
        ({"input_ids": [[5], [5, -1]], "labels": [[5], [5, -1]]}, "the token -1 cannot be right", 1),
        ({"input_ids": [[5, 6], [5, 6]], "labels": [[-100, 6], [6, -100]]}, "labels are not shifted", 1),
        ({"input_ids": [[5, 6], [5, 6]], "labels": [[-100, 6], [6]]}, "2 tokens in input_ids and 1 in labels", 1),
        ({"input_ids": [[5, 6]], "labels": [[None, 6]]}, "an empty place", 0),
        ({"input_ids": [[5.0, 6.0]], "labels": [[-100, 6]]}, "not a list of token ids", 0),
        ({"input_ids": ["text"], "labels": [[-100, 6]]}, "not a list of token ids", 0),
        ({"input_ids": [[5, 6]], "labels": [[5, 6]], "weights": [[1.0, -1.0]]}, "the weight -1.0 cannot be right", 0),
        ({"input_ids": [[5, 6]], "mask": [[1]]}, "2 tokens in input_ids and 1 in mask", 0),
    ],
)
def test_what_cannot_be_right_is_an_error_with_its_row(
    tmp_path: Path, columns: dict[str, Any], message: str, row: int
) -> None:
    path = write(tmp_path / "train.arrow", columns)
    with pytest.raises(DataError, match=message) as raised:
        start(plain_encoder(), path)
    assert raised.value.where == f"{path}[{row}]"


def test_rows_without_an_end_token_are_warned_about(tmp_path: Path) -> None:
    encoder = plain_encoder()
    start(encoder, write(tmp_path / "train.arrow", {"input_ids": [[5, 6]], "labels": [[-100, 6]]}))
    assert "would not learn to end an answer" in encoder.warnings["tokens without an end"]
    whole = plain_encoder()
    start(whole, write(tmp_path / "whole.arrow", {k: v for k, v in tokens(whole).items() if k != "mask"}))
    assert "tokens without an end" not in whole.warnings


def test_texts_in_tables_and_folders_are_rows_too(tmp_path: Path) -> None:
    texts = [{**row, "tools": None} for row in ROWS]  # tables have a null where a row has nothing
    write(tmp_path / "train/a.parquet", {name: [row[name] for row in texts[:10]] for name in texts[0]})
    write(tmp_path / "train/b.arrow", {name: [row[name] for row in texts[10:20]] for name in texts[0]})
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[20:])
    (tmp_path / "train/c.jsonl").write_text(lines)
    read = store.read_rows(tmp_path / "train")
    assert [{k: v for k, v in row.items() if k != "origin"} for row in read] == ROWS
    assert [read[n]["origin"] for n in (0, 10, 20)] == ["a.parquet[0]", "b.arrow[0]", "c.jsonl:1"]
    assert shards.count(tmp_path / "train") == 40
    encoder = plain_encoder()
    expected, _ = encode_all(encoder, ROWS)
    assert pairs(start(encoder, tmp_path / "train").rows) == [(one.input_ids, one.labels) for one in expected]


def test_texts_are_needed_where_answers_are_compared(tmp_path: Path) -> None:
    path = write(tmp_path / "train.arrow", {"input_ids": [[5, 6]], "labels": [[-100, 6]]})
    with pytest.raises(DataError, match="these rows are tokens"):
        store.read_rows(path)


def peak_mib() -> float:
    """The most resident memory since the last `clear_refs`, mapped pages included."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    encoder, length, batch = plain_encoder(max_seq_len=2_000), 1_024, 1_000
    start(encoder, write(tmp_path / "small.arrow", {"input_ids": [[5, 6]], "labels": [[-100, 6]]}))  # imports
    ids = pa.FixedSizeListArray.from_arrays(pa.array(np.full(batch * length, 5, np.int32)), length)
    part = pa.RecordBatch.from_pydict({"input_ids": ids.cast(pa.list_(pa.int32()))})
    (tmp_path / "train").mkdir()
    with pa.OSFile(str(tmp_path / "train/a.arrow"), "wb") as sink, ipc.new_stream(sink, part.schema) as out:
        for _ in range(40):
            out.write_batch(part)
    assert (tmp_path / "train/a.arrow").stat().st_size > 150 * 2**20
    del ids, part
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    encoder = plain_encoder(max_seq_len=2_000, labels="all_tokens")
    rows = start(encoder, tmp_path / "train", tmp_path / "cache").rows
    assert len(rows) == 40_000 and rows.lengths().max() == length
    assert sum(len(labels) for labels, _ in rows.labels()) == 40_000 * length
    assert rows[39_999]["input_ids"][-1] == 5
    assert peak_mib() - before < 60
