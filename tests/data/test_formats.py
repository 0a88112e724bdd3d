"""Every format with an example row, and what becomes of it; every fault of a row that can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import DataSection, SplitSection
from sft.data import rows, store
from sft.data.formats import Formats, guess_columns, make_row, parse_text
from sft.data.process import process
from sft.data.readers import RawRow
from sft.data.rows import RowFault
from sft.data.style import apply_style
from sft.errors import DataError


def stored(row: Any, format: str = "auto", **columns: str) -> tuple[str, dict[str, Any]]:
    record, format_read = make_row(RawRow("f:1", row), Formats(format, columns or None), None)
    assert record.pop("origin") == "f:1" and record.pop("id") == rows.row_id(record)
    return format_read, record


def fault(row: Any, format: str = "auto", **columns: str) -> str:
    with pytest.raises(RowFault) as caught:
        stored(row, format, **columns)
    return caught.value.reason


def short(user: str, assistant: str, system: str = "") -> dict[str, str]:
    return {"system": system, "user": user, "assistant": assistant}


@pytest.mark.parametrize(
    "row, format, record",
    [
        ({"system": "s", "user": "u", "assistant": "a"}, "chat", short("u", "a", "s")),
        ({"user": "u", "assistant": "a"}, "chat", short("u", "a")),
        ({"question": "q", "answer": "a"}, "qa", short("q", "a")),
        ({"Question": "q", "ANSWER": "a", "System Prompt": "s"}, "qa", short("q", "a", "s")),
        ({"query": "q", "response": "a"}, "qa", short("q", "a")),
        ({"instruction": "q", "response": "a"}, "qa", short("q", "a")),
        ({"input": "q", "output": "a"}, "qa", short("q", "a")),
        ({"human": "q", "assistant": "a"}, "chat", short("q", "a")),
        ({"Human": "q", "Bot": "a"}, "chat", short("q", "a")),
        ({"prompt": "q", "completion": "a", "label": True}, "prompt", short("q", "a")),
        ({"question": "q", "answer": "a", "label": 0, "images": []}, "qa", short("q", "a")),
        (
            {"question": "What is <image> in SVG?", "answer": "a", "rating": 2},
            "qa",
            short("What is <image> in SVG?", "a"),
        ),
        ({"dialog": ["q", "a"]}, "messages", short("q", "a")),
        ({"instruction": "i", "input": "x", "answer": "a"}, "qa", short("i\n\nx", "a")),
        ({"prompt": "i", "input": "x", "output": "a"}, "prompt", short("i\n\nx", "a")),
        ({"question": "q", "context": ["one", "two"], "answer": "a"}, "qa", short("q\n\none\n\ntwo", "a")),
        (
            {"utterances": [{"speaker": "USER", "text": "q"}, {"speaker": "Agent", "text": "a"}]},
            "messages",
            short("q", "a"),
        ),
        ({"id": "1", "data": ["q", "a"]}, "messages", short("q", "a") | {"source_id": "1"}),
        (
            {"chat_messages": [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "a"}]},
            "messages",
            short("q", "a"),
        ),
        (
            {
                "systemInstruction": {"parts": [{"text": "s"}]},
                "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}],
            },
            "messages",
            short("q", "a", "s"),
        ),
        (
            {
                "title": "t",
                "current_node": "c",
                "mapping": {
                    "r": {"parent": None, "message": None},
                    "b": {
                        "parent": "r",
                        "message": {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["q"]}},
                    },
                    "x": {
                        "parent": "b",
                        "message": {
                            "author": {"role": "assistant"},
                            "content": {"content_type": "text", "parts": ["old"]},
                        },
                    },
                    "c": {
                        "parent": "b",
                        "message": {
                            "author": {"role": "assistant"},
                            "content": {"content_type": "text", "parts": ["a"]},
                        },
                    },
                },
            },
            "messages",
            short("q", "a"),
        ),
        (
            {"conversations": "[{'from': 'human', 'value': \"it's q\"}, {'from': 'gpt', 'value': 'a'}]"},
            "messages",
            short("it's q", "a"),
        ),
        ({"prompt": "q\n\n###\n\n", "completion": " a END"}, "prompt (OpenAI's old marks removed)", short("q", "a")),
        (
            {
                "prompt": {
                    "text": "q",
                    "role": "prompter",
                    "replies": [
                        {"text": "worse", "role": "assistant", "rank": 1, "replies": []},
                        {
                            "text": "best",
                            "role": "assistant",
                            "rank": 0,
                            "replies": [{"text": "and?", "role": "prompter"}],
                        },
                    ],
                },
                "message_tree_id": "t",
            },
            "openassistant",
            short("q", "best"),
        ),
        ({"question": "q", "answer": 4}, "qa", short("q", "4")),
        ({"question": "q", "answer": True}, "qa", short("q", "true")),
        ({"question": "q", "answers": ["only"]}, "qa", short("q", "only")),
        ({"question": "q", "answers": {"text": ["first"], "answer_start": [3]}}, "qa", short("q", "first")),
        ({"question": "q", "context": "p", "answers": {"text": ["a"]}}, "qa", short("q\n\np", "a")),
        ({"question": "q", "context": {"title": ["t"]}, "answer": "a"}, "qa", short("q", "a")),
        ({"question": "q", "answers": ["", {"text": "a"}]}, "qa", short("q", "a")),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]}, "prompt", short("p", "c")),
        ({"text": "<s>[INST] q [/INST] a</s>"}, "text (llama2)", short("q", "a")),
        ({"prompt": "p", "completion": "c"}, "prompt", short("p", "c")),
        ({"prompt": "p", "response": "c"}, "prompt", short("p", "c")),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "completion": "a"},
            "prompt",
            short("u", "a", "s"),
        ),
        (
            {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]},
            "prompt",
            short("u", "a"),
        ),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", short("i", "o")),
        ({"instruction": "i", "output": "o"}, "alpaca", short("i", "o")),
        ({"instruction": "i", "input": " \n", "output": "o"}, "alpaca", short("i", "o")),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", short("i\n\nx", "o")),
        (
            {"instruction": "i", "context": "x", "response": "o", "category": "c"},
            "alpaca",
            {**short("i\n\nx", "o"), "category": "c"},
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            short("u", "a"),
        ),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            "messages",
            short("u", "a"),
        ),
        ({"conversations": ["u", "a"]}, "messages", short("u", "a")),
        ({"conversation": [{"human": "u", "assistant": "a"}]}, "messages", short("u", "a")),
        ({"conversation": [{"input": "u", "output": "a"}]}, "messages", short("u", "a")),
        ({"prompt": "q ->", "completion": " a END"}, "prompt (OpenAI's old marks removed)", short("q", "a")),
        (
            {"messages": '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]'},
            "messages",
            short("u", "a"),
        ),
        ({"input": "i", "target": "t"}, "rendered", {"input": "i", "target": "t"}),
    ],
)
def test_each_format_is_detected_by_its_keys(row: dict[str, Any], format: str, record: dict[str, Any]) -> None:
    assert stored(row) == (format, record)
    assert stored(row, format.partition(" ")[0]) == (format, record)


def test_unread_keys_are_counted() -> None:
    formats = Formats("auto", None)
    for number in range(3):
        formats.parse({"Question": "q", "answer": "a", "id": number, "hint": "h", "System Prompt": "s", "tags": "t"})
    formats.parse({"messages": [{"role": "user", "content": "u"}], "hint": 1, "score": 2})
    assert formats.unread == {"hint": 4, "score": 1}
    table = Formats("auto", {"user": "Q", "assistant": "A"})
    table.parse({"Q": "q", "A": "a", "B": "b"})
    assert table.unread == {"B": 1}


def test_a_weight_of_a_row_is_stored_and_reported_as_unused(tmp_path: Path) -> None:
    raw = tmp_path / "a.jsonl"
    raw.write_text('{"question": "q", "answer": "a", "weight": 3, "tags": ["t"], "category": "c"}\n', encoding="utf-8")
    ledger = process(DataSection(), tmp_path, str(raw))
    assert ledger.example is not None and ledger.example["weight"] == 3
    assert ledger.reports["keys_not_read"] == {"weight": 1}
    assert any("1 rows have a `weight`" in text for text in ledger.warnings)


def test_the_field_of_a_rows_weight_is_stored_as_a_number_and_a_bad_value_is_a_fault(tmp_path: Path) -> None:
    raw, good = tmp_path / "a.csv", ["0.5", "2", "", "0"]
    values = [*good, "high", "-1", "inf"]
    raw.write_text("question,answer,grade\n" + "".join(f"q{n},a,{v}\n" for n, v in enumerate(values)), encoding="utf-8")
    data = DataSection(weight_field="grade", max_dropped=1, split=SplitSection(train=1, val=0, test=0))
    ledger = process(data, tmp_path, str(raw))
    written = store.read_rows(tmp_path / "data/processed/train.jsonl")
    assert [row.get("grade") for row in written] == [0.5, 2.0, None, 0.0]
    assert ledger.named == {"no weight": 3} and "keys_not_read" not in ledger.reports
    assert ledger.examples["no weight"][0]["detail"] == 'grade is "high", not a number from 0 on'
    other = process(data.model_copy(update={"weight_field": "mark"}), tmp_path, str(raw))
    assert "no row has the key data.weight_field=mark" in other.warnings


@pytest.mark.parametrize(
    ("mark", "weight"), [({"weight": 0.5}, 0.5), ({"train": False}, 0), ({"training": True}, None)]
)
def test_turns_are_weighted_as_data_sets_write_it(mark: dict[str, Any], weight: float | None) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mark}]
    _, row = stored({"messages": chat})
    assert (row["messages"][1].get("weight") if weight is not None else row.get("messages")) == weight
    assert fault({"messages": [chat[0], {**chat[1], "weight": "much"}]}) == "no weight"


def test_rows_of_several_turns_are_stored_as_messages() -> None:
    turns = [("human", "1"), ("gpt", "2"), ("human", "3"), ("gpt", "4")]
    row = {"system": "s", "conversations": [{"from": role, "value": text} for role, text in turns]}
    assert stored(row)[1]["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]
    history = {"instruction": "3", "input": "", "output": "4", "history": [["1", "2"]], "system": "s"}
    assert stored(history) == ("alpaca", stored(row)[1])
    swift = {"query": "3", "response": "4", "history": [["1", "2"]], "system": "s"}
    assert stored(swift) == ("qa", stored(row)[1])
    table = {"query": "3", "response": "4", "history": '[["1", "2"]]', "system": "s"}
    assert stored(table) == ("qa", stored(row)[1])
    assert fault({**swift, "history": "earlier"}) == "unknown format"


def test_function_calls_become_tool_calls_with_their_tools() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "gpt", "value": "let me look"},
            {"from": "function_call", "value": '{"name": "get", "arguments": {"town": "Ulm"}}'},
            {"from": "function_call", "value": '[{"name": "get", "arguments": "{\\"town\\": \\"Bonn\\"}"}]'},
            {"from": "observation", "value": '{"sky": "blue"}'},
            {"from": "gpt", "value": "blue"},
        ],
        "tools": '[{"name": "get", "parameters": {}}]',
    }
    call = {"type": "function", "function": {"name": "get", "arguments": {"town": "Ulm"}}}
    other = {"type": "function", "function": {"name": "get", "arguments": {"town": "Bonn"}}}
    assert stored(row)[1] == {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "let me look", "tool_calls": [call, other]},
            {"role": "tool", "content": '{"sky": "blue"}'},
            {"role": "assistant", "content": "blue"},
        ],
        "tools": [{"type": "function", "function": {"name": "get", "parameters": {}}}],
    }


def test_openai_rows_with_parts_reasoning_weights_and_calls() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0, "refusal": None},
            {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "text": "one"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    call_read = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert stored(row)[1] == {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "", "tool_calls": [call_read], "weight": 0},
            {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c1"},
            {"role": "assistant", "content": "one", "reasoning_content": "hm"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }


def test_columns_are_mapped_by_name() -> None:
    row = {"Question": "q", "Best Answer": "a", "Other": "x", "Rule": ""}
    assert stored(row, user="Question", assistant="Best Answer", system="Rule") == ("columns", short("q", "a"))
    assert stored(row, user="question", assistant="best_answer") == ("columns", short("q", "a"))
    with pytest.raises(RowFault, match="no column 'Best Answr', did you mean 'Best Answer'"):
        stored(row, user="Question", assistant="Best Answr")
    assert fault({"Question": "q"}, user="Question", assistant="Best Answer") == "unknown format"
    with pytest.raises(DataError, match="a column of the questions"):
        Formats("columns", None)
    with pytest.raises(DataError, match="a column of the questions"):
        Formats("auto", {"user": "Question"})


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    "row, reason",
    [
        ("a text", "unknown format"),
        ([1], "unknown format"),
        ({}, "unknown format"),
        ({"text": "plain"}, "unknown format"),
        ({"messages": "hello"}, "unknown format"),
        ({"messages": ["hello"]}, "empty answer"),
        ({"messages": ["hello", 1]}, "unknown format"),
        ({"messages": "[hello"}, "unreadable"),
        ({"conversations": {"from": "human"}}, "unknown format"),
        ({"question": "q"}, "empty answer"),
        ({"instruction": "q", "input": "x"}, "empty answer"),
        ({"question": "q", "answer": None}, "empty answer"),
        ({"question": "q", "answer": " \n"}, "empty answer"),
        ({"question": "q", "answers": []}, "empty answer"),
        ({"input": "i", "target": ""}, "empty answer"),
        (turns(("user", "u")), "empty answer"),
        (turns(("user", "u"), ("assistant", "")), "empty answer"),
        (turns(("user", "u"), ("assistant", "a"), ("user", "u")), "empty answer"),
        ({"answer": "a"}, "no user turn"),
        ({"question": " ", "answer": "a"}, "no user turn"),
        ({"messages": []}, "no user turn"),
        (turns(("system", "s"), ("assistant", "a")), "no user turn"),
        (turns(("user", ""), ("assistant", "a")), "no user turn"),
        (turns(("narrator", "u"), ("assistant", "a")), "unknown role"),
        ({"messages": [{"content": "u"}]}, "unknown role"),
        (turns(("assistant", "a"), ("user", "u"), ("assistant", "a")), "roles out of order"),
        (turns(("user", "u"), ("user", "u"), ("assistant", "a")), "roles out of order"),
        (turns(("user", "u"), ("assistant", "a"), ("assistant", "a")), "roles out of order"),
        (turns(("user", "u"), ("system", "s"), ("assistant", "a")), "roles out of order"),
        (turns(("user", "u"), ("tool", "t"), ("assistant", "a")), "roles out of order"),
        ({"question": {"text": "q"}, "answer": "a"}, "not text"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "preference pair"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty answer"),
        ({"prompt": "q", "chosen": "a", "rejected": [1]}, "unknown format"),
        ({"chosen": "q a", "rejected": "q b"}, "no user turn"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "empty answer"),
        ({"prompt": "q", "completion": "a", "label": False}, "marked as bad"),
        ({"question": "q", "answer": "a", "is_correct": False}, "marked as bad"),
        ({**turns(("user", "u"), ("assistant", "a")), "kto_tag": "False"}, "marked as bad"),
        ({**turns(("user", "<image>Who?"), ("assistant", "a")), "images": ["x.png"]}, "not text"),
        ({"question": "q", "answer": "a", "video": "x.mp4"}, "not text"),
        ({"question": "q", "response_j": "a", "response_k": "b"}, "preference pair"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "unknown format"),
        ({"question": "q", "choices": {"text": ["a", "b"]}, "answerKey": "B"}, "unknown format"),
        ({"question": "q", "A": "x", "B": "y", "C": "z", "answer": "B"}, "unknown format"),
        ({"question": "q", "option_a": "x", "option_b": "y", "option_c": "z", "answer": "B"}, "unknown format"),
        ({"prompt": "q", "completion": "a", "label": 0}, "marked as bad"),
        ({"prompt": "q", "completion": "a", "label": "0"}, "marked as bad"),
        ({"question": "q", "answer": "a", "Feedback": "Thumbs down"}, "marked as bad"),
        (
            {
                "instruction": "q",
                "completions": [{"response": "a", "overall_score": 8}, {"response": "b", "overall_score": 2}],
            },
            "preference pair",
        ),
        ({"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]}, "preference pair"),
        ({"question": "<image>\nWho?", "answer": "a"}, "not text"),
        ({"instruction": "Name it.", "input": "<image>", "output": "a"}, "not text"),
        ({"question_id": 1, "turns": ["first question", "second question"]}, "unknown format"),
        (["q", "a"], "unknown format"),
        ({"question": "q", "answers": ["a", "b"], "correct": 0}, "unknown format"),
        ({"question": "q", "option1": "a", "option2": "b", "answer": "1"}, "unknown format"),
        ({"conversation_id": 1, "role": "user", "content": "q"}, "unknown format"),
        ({"question": "q", "answer": "a", "accepted": False}, "marked as bad"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "unknown format"),
        ({"question": "q", "answer": b"bytes"}, "not text"),
        (turns(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "a")), "not text"),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": "{"}]}, "unreadable"),
        ({**turns(("user", "u"), ("assistant", "a")), "tools": "[not json"}, "unreadable"),
    ],
)
def test_each_fault_has_its_reason(row: Any, reason: str) -> None:
    assert fault(row) == reason


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"Type": "x", "Question": "q", "Best Answer": "a", "Source": "s"}, ("Question", "Best Answer")),
        ({"Frage": "Was ist das?", "Die Antwort": "Ein langer Text.", "Quelle": "web"}, ("Frage", "Die Antwort")),
        ({"user_message": "q", "reply_text": "a"}, ("user_message", "reply_text")),
        ({"text": "a film of two hours", "id": 7, "label": 1}, ("text", "label")),
        ({"article": "a long text of news", "summary": "news"}, ("article", "summary")),
        ({"text": "only", "tree": {}}, None),
        ({"system": "You are kind.", "chat": "USER: hi ASSISTANT: hello"}, None),
        ({"uuid": "7", "name": "chat", "mails": [{"text": "q"}]}, None),
        ({"type": "message", "user": "U02A", "text": "hello", "ts": "1.0"}, None),
        ({"question": "How many?", "sql": "SELECT 1", "context": "CREATE TABLE t (a INT)"}, ("question", "sql")),
    ],
)
def test_columns_of_a_table_are_guessed(row: dict[str, Any], columns: tuple[str, str] | None) -> None:
    assert guess_columns(row) == columns


def test_calls_as_the_answer_of_a_row_with_tools_become_tool_calls() -> None:
    tools = json.dumps([{"name": "weather", "parameters": {}}])
    calls = json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}])
    _, record = stored({"query": "Weather?", "answers": calls, "tools": tools})
    assert record["messages"][1]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    ]
    assert record["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_a_context_that_is_no_text_is_reported_as_unread() -> None:
    formats = Formats("auto", None)
    for context in ("text", ["texts"], {"title": ["t"]}, [{"title": "t"}]):
        formats.parse({"question": "q", "context": context, "answer": "a"})
    assert formats.unread == {"context": 2}


def test_a_named_format_applies_to_every_row() -> None:
    assert fault({"question": "q", "answer": "a"}, "alpaca") == "unknown format"


def test_ids_tags_and_weights_of_a_row_are_stored() -> None:
    row = {"id": "mine", "tags": ["x"], "weight": 2.0, "question": "q", "answer": "a", "url": "dropped"}
    record, _ = make_row(RawRow("f:1", row), Formats("auto", None), "be kind")
    assert list(record) == ["id", "origin", "system", "user", "assistant", "tags", "weight", "source_id"]
    assert record["source_id"] == "mine" and record["system"] == "be kind"


def test_the_id_depends_on_the_content_alone_in_either_shape() -> None:
    def record(origin: str, answer: str, **more: Any) -> dict[str, Any]:
        return make_row(RawRow(origin, {"question": "u", "answer": answer, **more}), Formats("auto", None), None)[0]

    one, same = record("x:1", "a"), record("y:9", "a", tag=1)
    assert one["id"] == same["id"] == rows.row_id({"messages": rows.messages(one)}) == "d6f57b3204f6026f"
    assert record("x:1", "b")["id"] != one["id"]
    assert rows.reference(one) == "a" and not rows.is_rendered(one)
    assert rows.reference({"input": "i", "target": "t"}) == "t"


def test_the_schema_knows_the_formats() -> None:
    for name in ("chat", "qa", "prompt", "alpaca", "sharegpt", "messages", "rendered"):
        assert Formats(DataSection(format=name).format, None) is not None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format"):
        DataSection(format="nobody's")  # type: ignore[arg-type]


ONE = [("user", "Hi"), ("assistant", "Hello!")]
TWO = [("system", "Be brief."), ("user", "Hi\nthere"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye!")]


@pytest.mark.parametrize(
    "name, text, turns",
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n", ONE),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n"
            "Hello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>",
            TWO,
        ),
        ("chatml", "<|im_start|>user\nQ: 1? A: 2<|im_end|>\n<|im_start|>assistant\n A: x \n<|im_end|>", [
            ("user", "Q: 1? A: 2"), ("assistant", " A: x \n")]),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>",
            ONE,
        ),
        ("gemma", "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n", ONE),
        ("phi3", "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|endoftext|>", ONE),
        ("llama2", "<s>[INST] Hi [/INST] Hello! </s>", ONE),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi\nthere [/INST] Hello! </s><s>[INST] Bye [/INST] Bye! </s>",
            TWO,
        ),
        ("llama2", "<s>[INST] Hi [/INST]Hello!</s>", ONE),
        ("phi3", "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n", ONE),
        ("llama2", "[INST] Hi [/INST] Hello!</s>[INST] Bye [/INST] Bye!</s>", [*ONE, *TWO[3:]]),
    ],
)  # fmt: skip
def test_text_rows_are_split_by_control_tokens(name: str, text: str, turns: list[tuple[str, str]]) -> None:
    name_read, messages = parse_text(text)
    assert (name_read, [(message["role"], message["content"]) for message in messages]) == (name, turns)


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time.",
        "",
        "### Instruction:\nHi\n\n### Response:\nHello!",
        "USER: Hi ASSISTANT: Hello!",
        "User: Hi\nAssistant: Hello!",
        "A: Hello!\nQ: Hi",
        "Q: Hi\nA: Hello!\nQ: Bye\nA: Bye!",
        "Q: What does a quiz look like?\nA: Like this:\nQ: 1\nA: 2",
        "Q: Hi A: Hello!",
        "A quiz.\nQ: Hi\nA: Hello!",
        "User: Write a quiz.\nQ: Hi\nA: Hello!",
        "a chat about [INST] and <|im_start|>user\nHi",
        "<|im_start|>user\nHi<|im_start|>assistant\nHello!<|im_end|>",
        "[INST] What does [INST] mean? [/INST] It starts a question.</s>",
        "[INST] Hi [/INST] Write [INST] question [/INST] answer.</s>",
        "before<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>between<|im_start|>assistant\nHello!<|im_end|>",
    ],
)
def test_a_text_without_control_tokens_is_a_fault_and_never_a_guess(text: str) -> None:
    with pytest.raises(RowFault, match="unknown format"):
        parse_text(text)


def test_one_question_line_and_one_answer_line_are_an_exchange_with_what_is_before_them() -> None:
    text = "table: t\ncolumns: a, b\nQ: How many?\nAll of them? \nA: SELECT a\n\nFROM t\n"
    name, (asked, answered) = parse_text(text)
    assert (name, asked["content"]) == ("q/a", "table: t\ncolumns: a, b\nHow many?\nAll of them?")
    assert answered["content"] == "SELECT a\n\nFROM t"
    assert [turn["content"] for turn in parse_text("Q: Hi\nA: Hello!")[1]] == ["Hi", "Hello!"]


@pytest.mark.parametrize(
    "answer",
    [
        "Write:\n### Instruction:\nx\n\n### Response:\ny",
        "Assistant: Sure.\nUser: hi",
        "Q: 1\nA: 2",
        "USER: a ASSISTANT: b",
    ],
)
def test_an_answer_that_quotes_another_template_stays_whole(answer: str) -> None:
    text = f"<|im_start|>user\nShow me.<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    assert [message["content"] for message in parse_text(text)[1]] == ["Show me.", answer]
    with pytest.raises(RowFault, match="unknown format"):
        parse_text(f"### Instruction:\nShow me.\n\n### Response:\n{answer}")


@pytest.mark.parametrize(
    "answers, references",
    [
        (["a", "b", "a"], ["a", "b"]),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),
        ({"value": "a", "aliases": ["a", "A"]}, ["a", "A"]),
        (["a"], None),
        ("a", None),
    ],
)
def test_of_many_answers_the_first_is_trained_on_and_all_are_stored(
    tmp_path: Path, answers: Any, references: Any
) -> None:
    raw = tmp_path / "a.jsonl"
    raw.write_text(json.dumps({"question": "q", "answers": answers}) + "\n", encoding="utf-8")
    row = process(DataSection(), tmp_path, str(raw)).example
    assert row is not None and row["assistant"] == "a" and row.get("references") == references
    assert rows.references(row) == (references or ["a"])


def test_rows_of_a_classification_keep_both_labels() -> None:
    """Only a label that says that the answer is bad counts, not one that is the answer."""
    for answer in ("yes", "no", "true", "false"):
        row = {"instruction": "Is it so?", "input": "text", "output": answer, "label": answer}
        assert stored(row)[1]["assistant"] == answer
    assert stored({"question": "q", "answer": "bad", "label": "bad"})[1]["assistant"] == "bad"


def chat(*texts: str) -> list[dict[str, str]]:
    """Turns by turns: user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


GPT = {"from": "gpt", "value": "Paris."}
PAIR = {"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "Lyon."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, PAIR),  # TRL, plain
        ({"question": PAIR["prompt"], "chosen": "Paris.", "rejected": "Lyon."}, PAIR),
        ({"instruction": "Capital", "input": "France", "chosen": "a", "rejected": "b"},
         {"prompt": "Capital\n\nFrance", "chosen": "a", "rejected": "b"}),  # LLaMA-Factory, alpaca
        ({"conversations": [{"from": "human", "value": PAIR["prompt"]}], "chosen": GPT,
          "rejected": {"from": "gpt", "value": "Lyon."}}, PAIR),  # LLaMA-Factory, sharegpt
        ({"prompt": chat(PAIR["prompt"]), "chosen": [{"role": "assistant", "content": "Paris."}],
          "rejected": [{"role": "assistant", "content": "Lyon."}]}, PAIR),  # TRL, conversational
        ({"prompt": PAIR["prompt"], "messages": chat(PAIR["prompt"], "Paris."), "score_chosen": 8.0,
          "chosen": chat(PAIR["prompt"], "Paris."), "rejected": chat(PAIR["prompt"], "Lyon.")}, PAIR),  # UltraFeedback
        ({"messages": chat(PAIR["prompt"], "Paris."), "rejected_response": "Lyon."}, PAIR),  # ms-swift
        ({"messages": chat(PAIR["prompt"], "Paris."), "chosen": "Paris.", "rejected": "Lyon."}, PAIR),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant: Gone.",
          "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant: No\n\nnever."},
         {"messages": chat("Hi", "Yes?", "Go"), "chosen": "Gone.", "rejected": "No\n\nnever."}),  # HH-RLHF
        ({"system": "Be brief.", "question": "q", "chosen": "a", "rejected": "b"},
         {"messages": [{"role": "system", "content": "Be brief."}, *chat("q")], "chosen": "a", "rejected": "b"}),
        ({"chosen": chat("q", "a"), "rejected": chat("q", "b", "more", "c")},
         {"prompt": "q", "chosen": "a", "rejected": chat("q", "b", "more", "c")[1:]}),
    ],
)  # fmt: skip
def test_preference_pairs_are_read_with_their_prompt(row: dict[str, Any], expected: dict[str, Any]) -> None:
    format, record = stored(row)
    assert (format, record) == ("preference", expected)


def test_a_pair_counts_as_the_row_of_its_chosen_answer() -> None:
    pair, plain = stored(PAIR)[1], stored({"question": PAIR["prompt"], "answer": "Paris."})[1]
    assert rows.messages(pair) == rows.messages(plain) and rows.reference(pair) == "Paris."
    assert rows.prompt_id(pair) == rows.prompt_id(plain)
    other = stored({**PAIR, "rejected": "Nice."})[1]
    assert rows.row_id(other) != rows.row_id(pair) and rows.comparison_text(other) != rows.comparison_text(pair)


def test_a_style_goes_into_the_prompt_of_a_pair() -> None:
    styled = apply_style({"id": "7", **PAIR}, "Be brief.", "replace")
    system = {"role": "system", "content": "Be brief."}
    answers = {"chosen": "Paris.", "rejected": "Lyon."}
    assert styled == {"id": "7", "messages": [system, *chat(PAIR["prompt"])], **answers}
    assert apply_style(styled, "Be kind.", "append")["messages"][0]["content"] == "Be brief.\n\nBe kind."


def test_answers_in_the_prompt_of_a_pair_are_context_on_both_sides() -> None:
    chosen, rejected = rows.sides(
        {"id": "7", "messages": chat("a", "b", "c"), "chosen": "d", "rejected": chat("", "e")[1:]}
    )
    prompt = [chat("a")[0], {**chat("a", "b")[1], "weight": 0}, chat("a", "b", "c")[2]]
    assert chosen == {"id": "7", "messages": [*prompt, {"role": "assistant", "content": "d"}]}
    assert rejected == {"id": "7", "messages": [*prompt, {"role": "assistant", "content": "e"}]}


def test_rated_answers_keep_their_label_where_both_kinds_are_used() -> None:
    def label(row: dict[str, Any]) -> Any:
        return make_row(RawRow("raw.jsonl:1", row), Formats("auto", None, rated=True), None)[0].get("label")

    qa = {"prompt": "q", "completion": "a"}
    assert label({**qa, "label": True}) is True and label({**qa, "label": False}) is False
    assert label({**qa, "feedback": "thumbs_up"}) is True and label({**qa, "label": "0"}) is False
    assert label(PAIR) is None
    with pytest.raises(RowFault, match="no `label` says whether the answer is good"):
        label(qa)


def test_open_questions_with_empty_options_are_no_multiple_choice() -> None:
    assert stored({"question": "2 + 2?", "options": [], "answer": "4"})[1]["assistant"] == "4"
