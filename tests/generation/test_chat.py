"""The chat's commands and history, with a scripted model in place of a real one."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import GenerationSection
from sft.errors import DataError, ModelError
from sft.generation.chat import ChatSession, last_conversation, line_reader, printable
from sft.generation.stop import Answer


class Scripted:
    """Answers with the number of messages and the attempt; records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[dict[str, Any]], GenerationSection, int]] = []
        self.interrupt = self.fail = False
        self.closed = 0

    def __call__(self, messages: list[dict[str, Any]], settings: GenerationSection, attempt: int) -> Iterator[str]:
        self.calls.append((messages, settings, attempt))
        try:
            yield "answer "
            if self.interrupt:
                raise KeyboardInterrupt
            if self.fail:
                raise ModelError("the model is gone")
            yield f"{len(messages)}.{attempt}"
        finally:
            self.closed += 1


def chat(
    tmp_path: Path, *lines: Any, model: Scripted | None = None, **kwargs: Any
) -> tuple[str, ChatSession, Scripted]:
    output: list[str] = []
    model = model or Scripted()
    session = ChatSession(
        model, output.append, settings=GenerationSection(), save_path=tmp_path / "outputs" / "chat.jsonl", **kwargs
    )
    session.run(fed(*lines))
    return "".join(output), session, model


def fed(*lines: Any) -> Callable[[], str]:
    left = iter(lines)

    def read() -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return str(line)

    return read


def test_a_conversation_keeps_its_history_and_its_system_text(tmp_path: Path) -> None:
    output, session, model = chat(tmp_path, "hello", "", "and then?", "/exit", "never read", system="Be brief.")
    assert output == "answer 2.0\nanswer 4.0\n"
    assert [message["role"] for message in model.calls[1][0]] == ["system", "user", "assistant", "user"]
    assert session.turns[-1] == {"role": "assistant", "content": "answer 4.0"}


def test_an_unknown_command_does_not_reach_the_model(tmp_path: Path) -> None:
    output, _, model = chat(tmp_path, "/hlep", "/ask()", "/help")
    assert output.startswith("there is no command /hlep: /help lists them\nthere is no command /ask()")
    assert "/retry" in output and not model.calls


def test_reset_and_system_start_over(tmp_path: Path) -> None:
    output, session, model = chat(
        tmp_path, "/system", "hello", "/reset", "hello", "/system Speak French.", "hello", "/system none", "hello"
    )
    assert output.startswith("system: (none)\n")
    assert [len(messages) for messages, _, _ in model.calls] == [1, 1, 2, 1]
    assert session.system is None


def test_retry_answers_again_with_another_attempt_and_undo_removes(tmp_path: Path) -> None:
    output, session, model = chat(tmp_path, "/retry", "/undo", "one", "two", "/retry", "/retry", "/undo", "three")
    assert output.startswith("(there is no question to answer again)\n(there is nothing to remove)\n")
    assert "greedy: the answer will be the same" in output
    assert [(len(messages), attempt) for messages, _, attempt in model.calls] == [
        (1, 0), (3, 0), (3, 1), (3, 2), (3, 0),
    ]  # fmt: skip
    assert [turn["content"] for turn in session.turns if turn["role"] == "user"] == ["one", "three"]


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    model = Scripted()
    model.interrupt = True
    output, session, _ = chat(tmp_path, KeyboardInterrupt(), "one", "two", model=model)
    assert output == "\n(/exit or Ctrl-D leaves)\nanswer  [stopped]\nanswer  [stopped]\n"
    assert [turn["content"] for turn in session.turns] == ["one", "answer ", "two", "answer "]
    assert model.closed == 2


def test_a_question_that_is_stopped_before_its_answer_is_removed(tmp_path: Path) -> None:
    def stopped(messages: list[dict[str, Any]], settings: GenerationSection, attempt: int) -> Iterator[str]:
        raise KeyboardInterrupt
        yield ""

    output, session, _ = chat(tmp_path, "a long text", model=stopped)  # type: ignore[arg-type]
    assert output == " [stopped] The question is removed.\n" and session.turns == []


def test_an_error_is_shown_and_its_question_removed(tmp_path: Path) -> None:
    model = Scripted()
    model.fail = True
    output, session, _ = chat(tmp_path, "one", "/help", model=model)
    assert "error: the model is gone" in output and "/retry" in output
    assert session.turns == []


def test_settings_are_checked_and_sampling_follows_from_a_temperature(tmp_path: Path) -> None:
    output, session, model = chat(
        tmp_path, "/set temperature 0.4", "one", "/set temperature -1", "/set heat 3", "/set top_k x", "/set"
    )
    assert (model.calls[0][1].temperature, model.calls[0][1].do_sample) == (0.4, True)
    assert "temperature = 0.4 (answers are sampled now)" in output
    assert "temperature: expected a number (above 0), not -1\n" in output
    assert (
        "top_k: expected a whole number (at least 0), not x\n" in output
        and "/set takes one of max_new_tokens" in output
    )
    assert session.settings.temperature == 0.4


def test_a_conversation_is_saved_as_a_row_and_loaded_again(tmp_path: Path) -> None:
    other = tmp_path / "mine.jsonl"
    output, _, _ = chat(tmp_path, "/save", "one", "/save", "two", "/save", f"/save {other}", system="S")
    assert output.startswith("(there is nothing to save)\n")
    rows = [json.loads(line) for line in (tmp_path / "outputs/chat.jsonl").read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 5]
    assert last_conversation(other) == rows[1]["messages"]
    assert "(loaded 4 turns)" in chat(tmp_path, "/load")[0]  # where /save writes by default
    output, session, model = chat(tmp_path, f"/load {other}", "three", "/load nowhere.jsonl", "/save /proc/no/file")
    assert session.system == "S" and len(model.calls[0][0]) == 6
    assert "no saved conversation in this file" in output and "cannot be written" in output


def test_tokens_are_counted_and_a_backslash_continues_a_line(tmp_path: Path) -> None:
    output, session, _ = chat(
        tmp_path, "/tokens", "one\\", "two", "/tokens", count_tokens=lambda m: sum(len(x["content"]) for x in m)
    )
    assert output == "(the conversation is empty)\nanswer 1.0\n17 tokens in 2 turns\n"
    assert session.turns[0]["content"] == "one\ntwo"


def test_a_broken_conversation_file_is_one_error(tmp_path: Path) -> None:
    odd = '{"messages": [{"role": 5, "content": "x"}]}'
    for content in ("", "{}", '{"messages": 4}', '{"messages": [{"role": "user"}]}', odd, "[" * 100_000):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(DataError, match="no saved conversation"):
            last_conversation(tmp_path / "x.jsonl")


def test_a_pipe_of_odd_bytes_is_read_and_a_closed_one_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/exit\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", odd)
    session, model = chat(tmp_path)[1:]
    session.run(line_reader(tmp_path / "history"))
    assert model.calls[0][0][-1]["content"] == "caf\ufffd"
    monkeypatch.setattr("sys.stdin", None)
    session.run(line_reader(tmp_path / "history"))
    assert len(model.calls) == 1


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x07\n\tc\x9b") == "a[2Jb\n\tc"


def test_base_and_tuned_are_compared_outside_of_the_conversation(tmp_path: Path) -> None:
    calls: list[list[dict[str, Any]]] = []
    shown: list[tuple[str, str]] = []

    def base(messages: list[dict[str, Any]], settings: GenerationSection, attempt: int) -> Iterator[str]:
        calls.append(messages)
        yield "of the "
        yield "base"

    output, session, _ = chat(
        tmp_path, "/compare", "one", "/compare", "/compare other?", base=base,
        side_by_side=lambda *sides: shown.append(sides),
    )  # fmt: skip
    assert output.startswith("(there is no question)\n")
    assert shown == [("of the base", "answer 1.0"), ("of the base", "answer 3.0")]
    assert [messages[-1]["content"] for messages in calls] == ["one", "other?"] and len(session.turns) == 2
    assert "no adapter to compare" in chat(tmp_path, "one", "/compare")[0]


def test_the_speed_is_shown_after_an_answer(tmp_path: Path) -> None:
    def answer(messages: list[dict[str, Any]], settings: GenerationSection, attempt: int) -> Any:
        yield "words"
        return Answer([], "words", settings.max_new_tokens != 7, 7)

    output = chat(tmp_path, "one", "/set max_new_tokens 7", "one", model=answer)[0]  # type: ignore[arg-type]
    assert re.match(r"words\n\(7 tokens, [0-9.]+ tokens/s\)\n", output)
    assert output.rstrip().endswith("tokens/s; cut at max_new_tokens, for more: /set max_new_tokens 28)")


RAW = "1. 1. 1. 2.\n<div>x</div> <!-- --> <think>hm</think> __init__.py\nsingle\nline breaks"


def verbatim(messages: list[dict[str, Any]], settings: GenerationSection, attempt: int) -> Iterator[str]:
    yield from (RAW[at : at + 7] for at in range(0, len(RAW), 7))


def test_an_answer_is_shown_exactly_as_the_model_wrote_it(tmp_path: Path) -> None:
    output, session, _ = chat(tmp_path, "one", model=verbatim)  # type: ignore[arg-type]
    assert output == RAW + "\n" and session.turns[-1]["content"] == RAW


def test_markdown_is_a_switch_for_finished_answers(tmp_path: Path) -> None:
    rendered: list[str] = []
    output, session, _ = chat(
        tmp_path,
        "/markdown",
        "one",
        "/markdown",
        "two",
        model=verbatim,
        markdown=rendered.append,  # type: ignore[arg-type]
    )
    assert rendered == [RAW] and output.count("<div>") == 1
    assert [turn["content"] for turn in session.turns if turn["role"] == "assistant"] == [RAW, RAW]
    assert "Markdown needs a terminal" in chat(tmp_path, "/markdown")[0]


@pytest.mark.parametrize("word", ["/bye", "/exit", "exit", "Quit", " bye "])
def test_every_usual_word_leaves(tmp_path: Path, word: str) -> None:
    assert chat(tmp_path, "/?", word, "never read")[2].calls == []


def test_a_long_prompt_is_announced_and_something_shows_before_the_first_piece(tmp_path: Path) -> None:
    shown: list[str] = []

    def slow(messages: list[dict[str, Any]], settings: GenerationSection, attempt: int) -> Iterator[str]:
        assert shown[-1].startswith("reading ")
        yield "answer"
        assert shown[-1] == ""

    def run(text: str, speed: float) -> str:
        more: Any = {"model": slow, "count_tokens": lambda m: len(m[-1]["content"]), "status": shown.append}
        return chat(tmp_path, text, reading_speed=speed, **more)[0]

    assert run("short", 0.0) == "answer\n" and shown[0] == "reading 5 tokens ..."
    assert run("x" * 2000, 0.0) == "(the model reads 2,000 tokens first; Ctrl-C stops it)\nanswer\n"
    assert run("x" * 2000, 100.0).startswith("(the model reads 2,000 tokens first, which takes about 20 s; Ctrl-C")
    assert run("x" * 2000, 1000.0) == "answer\n"


def test_the_system_command_shows_what_the_template_adds(tmp_path: Path) -> None:
    def render(messages: list[dict[str, Any]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}\n" for message in messages)

    output = chat(tmp_path, "/system Be kind.", "hello", "/system", render=render)[0]
    assert output.endswith(
        "system: Be kind.\nwith the template, the model reads:\n<system>Be kind.\n<user>(your question)\n\n"
    )
