"""One row of a known format to its turns (and tools): a function for each format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sft.data import text_rows
from sft.data.conversation import Message, conversation, text_of, tools
from sft.data.faults import UNKNOWN_FORMAT, RowFault

Row = dict[str, Any]
SYSTEM = ("system", "system_prompt", "system_message")
QUESTIONS = ("question", "query", "problem", "instruction")
ANSWERS = ("answer", "answers", "response", "solution", "output")
COMPLETIONS = ("completion", "response", "answer", "output")
INPUTS = ("input", "context")
PASSAGES = ("context", "passage")
OUTPUTS = ("output", "response")
TURNS = ("messages", "conversations", "conversation")
READ = {  # what each format reads besides; any other key of a row is told in the ledger
    "sharegpt": (*TURNS, "tools", "functions"),
    "messages": (*TURNS, "tools", "functions"),
    "chat": ("user", "assistant"),
    "rendered": ("input", "target"),
    "alpaca": ("instruction", "history", *INPUTS, *OUTPUTS),
    "prompt": ("prompt", "tools", *COMPLETIONS, *PASSAGES),
    "qa": ("input", "output", *QUESTIONS, *ANSWERS, *PASSAGES),
    "text": ("text",),
}


class Parsed(NamedTuple):
    """One row's format, its turns and tools; for rendered rows `pair` is (input, target) and there are no turns.

    references: all good answers, where the row has more than the one that is trained on.
    """

    format: str
    messages: list[Message]
    tools: list[Message]
    pair: tuple[str, str] | None = None
    references: tuple[str, ...] = ()


def first(names: dict[str, str], wanted: tuple[str, ...]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def _with_system(row: Row, names: dict[str, str], messages: list[Message]) -> list[Message]:
    key = first(names, SYSTEM)
    system = text_of(row[key], key) if key else ""
    given = bool(messages) and messages[0]["role"] == "system"
    if system and not given:
        return [{"role": "system", "content": system}, *messages]
    return messages[1:] if given and not messages[0]["content"] else messages


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _messages(format: str) -> Callable[[Row, dict[str, str]], Parsed]:
    def read(row: Row, names: dict[str, str]) -> Parsed:
        key = first(names, TURNS) or ""
        messages = _with_system(row, names, conversation(row[key], key))
        defined = first(names, ("tools", "functions"))
        return Parsed(format, messages, tools(row[defined]) if defined else [])

    return read


def _chat(row: Row, names: dict[str, str]) -> Parsed:
    turn = _turn(text_of(row[names["user"]], "user"), text_of(row[names["assistant"]], "assistant"))
    return Parsed("chat", _with_system(row, names, turn), [])


def _rendered(row: Row, names: dict[str, str]) -> Parsed:
    return Parsed("rendered", [], [], (text_of(row[names["input"]], "input"), text_of(row[names["target"]], "target")))


def alpaca_user(instruction: str, given: str) -> str:
    """The user turn of an alpaca row: an empty input leaves no trace (docs/decisions/0002-alpaca-empty-input.md)."""
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _alpaca(row: Row, names: dict[str, str]) -> Parsed:
    instruction = text_of(row[names["instruction"]], "instruction")
    given, output = first(names, INPUTS), first(names, OUTPUTS)
    user = alpaca_user(instruction, text_of(row[given], given) if given else "")
    messages = [*_history(row, names), *_turn(user, text_of(row[output], output) if output else "")]
    return Parsed("alpaca", _with_system(row, names, messages), [])


def _history(row: Row, names: dict[str, str]) -> list[Message]:
    """Earlier turns as LLaMA-Factory's alpaca files hold them: [[question, answer], ...]."""
    pairs = row[names["history"]] if "history" in names else None
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowFault(UNKNOWN_FORMAT, "history is not a list of [question, answer]")
    return [turn for user, answer in pairs for turn in _turn(text_of(user, "history"), text_of(answer, "history"))]


def in_turns(row: Row, names: dict[str, str]) -> bool:
    """Whether prompt or completion is a list of turns, and not a text or a list of good answers."""
    answer = row[first(names, COMPLETIONS) or ""]
    return isinstance(row[names["prompt"]], list) or (
        isinstance(answer, list) and bool(answer) and isinstance(answer[0], dict) and "role" in answer[0]
    )


def _prompt_messages(row: Row, names: dict[str, str]) -> Parsed:
    key = first(names, COMPLETIONS) or ""
    asked, answer = row[names["prompt"]], row[key]
    if not isinstance(asked, list):
        asked = [{"role": "user", "content": asked}]
    if not isinstance(answer, list):
        answer = [{"role": "assistant", "content": answer}]
    messages = conversation(asked, "prompt") + conversation(answer, key)
    defined = tools(row[names["tools"]]) if "tools" in names else []
    return Parsed("prompt", _with_system(row, names, messages), defined)


def _qa(row: Row, names: dict[str, str]) -> Parsed:
    question, answer = first(names, QUESTIONS), first(names, ANSWERS)
    if not (question and answer):
        question, answer = names["input"], names["output"]
    return _pair("qa", row, names, question, answer)


def _pair(format: str, row: Row, names: dict[str, str], question: str, answer: str) -> Parsed:
    answers = _answers(row[answer], answer)
    asked, passage = text_of(row[question], question), row.get(first(names, PASSAGES) or "")
    turn = _turn(alpaca_user(asked, passage) if isinstance(passage, str) else asked, answers[0])
    return Parsed(format, _with_system(row, names, turn), [], None, answers if len(answers) > 1 else ())


def _answers(value: Any, name: str) -> tuple[str, ...]:
    """All good answers, the one to learn first: a text, a list, or as SQuAD and TriviaQA hold them."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    elif isinstance(value, dict) and "value" in value:
        aliases = value.get("aliases")
        value = [value["value"], *(aliases if isinstance(aliases, list) else ())]
    if not isinstance(value, list):
        return (text_of(value, name),)
    texts = (one["text"] if isinstance(one, dict) and "text" in one else one for one in value)
    return tuple(dict.fromkeys(text for one in texts if (text := text_of(one, name)).strip())) or ("",)


def _text(row: Row, names: dict[str, str]) -> Parsed:
    style, messages = text_rows.parse(text_of(row[names["text"]], "text"))
    return Parsed(f"text ({style})", _with_system(row, names, messages), [])


def _columns(row: Row, columns: dict[str, str]) -> Parsed:
    messages = [{"role": role, "content": text_of(row[name], name)} for role, name in columns.items()]
    return Parsed("columns", [m for m in messages if m["role"] != "system" or m["content"].strip()], [])


READERS: dict[str, Callable[[Row, dict[str, str]], Parsed]] = {
    "sharegpt": _messages("sharegpt"),
    "messages": _messages("messages"),
    "chat": _chat,
    "rendered": _rendered,
    "alpaca": _alpaca,
    "prompt": lambda row, names: _pair("prompt", row, names, names["prompt"], first(names, COMPLETIONS) or ""),
    "prompt as messages": _prompt_messages,
    "qa": _qa,
    "text": _text,
    "columns": _columns,
}
