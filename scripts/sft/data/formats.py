"""The formats that rows come in, told row by row from their keys, each turned into messages (and tools)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sft.data import text_rows
from sft.data.conversation import Message, conversation, text_of, tools
from sft.data.faults import EMPTY_ANSWER, NO_USER_TURN, UNKNOWN_FORMAT, RowFault
from sft.errors import DataError

Row = dict[str, Any]
MOST_PLANS = 1_000  # different sets of keys remembered
SYSTEM = ("system", "system_prompt", "system_message")
QUESTIONS = ("question", "query", "problem", "instruction")
ANSWERS = ("answer", "answers", "response", "solution", "output")
COMPLETIONS = ("completion", "response", "answer", "output")
INPUTS = ("input", "context")
OUTPUTS = ("output", "response")
ASKING = ("user", "prompt", *QUESTIONS)
GIVING = ("assistant", "completion", *ANSWERS)
TURNS = ("messages", "conversations", "conversation")


class Parsed(NamedTuple):
    """One row's format, its turns and tools; for rendered rows `pair` is (input, target) and there are no turns.

    references: all good answers, where the row has more than the one that is trained on.
    """

    format: str
    messages: list[Message]
    tools: list[Message]
    pair: tuple[str, str] | None = None
    references: tuple[str, ...] = ()


class Formats:
    """Turns raw rows into turns. format: `auto` or the one to hold every row to. columns: role -> column's name."""

    def __init__(self, format: str, columns: dict[str, str] | None) -> None:
        if (columns or format == "columns") and not {"user", "assistant"} <= set(columns or ()):
            mend = "--set data.columns.user=NAME --set data.columns.assistant=NAME"
            raise DataError("data.columns must name the columns of user and assistant", where="data.columns", mend=mend)
        self._format, self._columns = format, columns
        self._plans: dict[tuple[str, ...], tuple[dict[str, str], str]] = {}

    def parse(self, row: Any) -> Parsed:
        """The row's turns. Raises RowFault where the format is not known or a field is not text."""
        if not isinstance(row, dict):
            raise RowFault(UNKNOWN_FORMAT, "not an object with keys")
        keys = tuple(row)
        if keys not in self._plans:
            if len(self._plans) > MOST_PLANS:
                self._plans.clear()
            names = _names(keys)
            self._plans[keys] = names, self._choose(row, names)
        names, format = self._plans[keys]
        if format == "prompt" and isinstance(row[names["prompt"]], list):
            format = "prompt as messages"
        return READERS[format](row, self._columns if format == "columns" and self._columns else names)

    def _choose(self, row: Row, names: dict[str, str]) -> str:
        if self._columns and self._format in ("auto", "columns"):
            missing = [name for name in self._columns.values() if name not in row]
            if missing:
                raise RowFault(UNKNOWN_FORMAT, f"no column {missing[0]!r}, only {_listed(row)}")
            return "columns"
        if self._format != "auto":
            if not FITS[self._format](names, row):
                raise RowFault(UNKNOWN_FORMAT, f"not {self._format}: the keys are {_listed(row)}")
            return self._format
        for format, fits in FITS.items():
            if fits(names, row):
                return format
        asks, gives = _first(names, ASKING), _first(names, GIVING)
        if asks and not gives:
            raise RowFault(EMPTY_ANSWER, f"no answer beside {asks!r}: the keys are {_listed(row)}")
        if gives and not asks:
            raise RowFault(NO_USER_TURN, f"no question beside {gives!r}: the keys are {_listed(row)}")
        raise RowFault(UNKNOWN_FORMAT, f"no format is known for it: the keys are {_listed(row)}")


def _names(keys: tuple[str, ...]) -> dict[str, str]:
    """Plain spelling (`best answer` -> `best_answer`) to the key as it stands; an exact spelling wins."""
    names = {key.strip().lower().replace(" ", "_").replace("-", "_"): key for key in reversed(keys) if key}
    return {**names, **{key: key for key in keys if key in names}}


def _listed(row: Row) -> str:
    keys = ", ".join(str(key) for key in list(row)[:12])
    return keys[:200] + ("..." if len(keys) > 200 or len(row) > 12 else "") if keys else "(none)"


def _first(names: dict[str, str], wanted: tuple[str, ...]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def _has(*groups: tuple[str, ...]) -> Callable[[dict[str, str], Row], bool]:
    return lambda names, _row: all(_first(names, group) for group in groups)


def _turns_of(names: dict[str, str], row: Row, key: str) -> bool:
    """Whether the row has a list of turns whose first is told by `role` or by `from`, as `key` says."""
    name = _first(names, TURNS)
    if name is None:
        return False
    turns = row[name]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return (name.lower() == "messages") == (key == "role")
    return key in turns[0] if key == "from" else "from" not in turns[0]


# In this order: the first that fits is taken.
FITS: dict[str, Callable[[dict[str, str], Row], bool]] = {
    "sharegpt": lambda names, row: _turns_of(names, row, "from"),
    "messages": lambda names, row: _turns_of(names, row, "role"),
    "chat": _has(("user",), ("assistant",)),
    "rendered": lambda names, row: "input" in names and "target" in names and "instruction" not in names,
    "alpaca": lambda names, row: (
        "instruction" in names
        and ("output" in names or ("response" in names and ("context" in names or "input" in names)))
    ),
    "prompt": _has(("prompt",), COMPLETIONS),
    "qa": lambda names, row: (
        bool(_first(names, QUESTIONS) and _first(names, ANSWERS)) or {"input", "output"} <= names.keys()
    ),
    "text": lambda names, row: "text" in names and not _first(names, (*ASKING, *GIVING)),
}


def _with_system(row: Row, names: dict[str, str], messages: list[Message]) -> list[Message]:
    key = _first(names, SYSTEM)
    system = text_of(row[key], key) if key else ""
    given = bool(messages) and messages[0]["role"] == "system"
    if system and not given:
        return [{"role": "system", "content": system}, *messages]
    return messages[1:] if given and not messages[0]["content"] else messages


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _messages(format: str) -> Callable[[Row, dict[str, str]], Parsed]:
    def read(row: Row, names: dict[str, str]) -> Parsed:
        key = _first(names, TURNS) or ""
        messages = _with_system(row, names, conversation(row[key], key))
        defined = _first(names, ("tools", "functions"))
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
    given, output = _first(names, INPUTS), _first(names, OUTPUTS)
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


def _prompt(row: Row, names: dict[str, str]) -> Parsed:
    key = _first(names, COMPLETIONS) or ""
    return _pair("prompt", row, names, names["prompt"], key)


def _prompt_messages(row: Row, names: dict[str, str]) -> Parsed:
    key = _first(names, COMPLETIONS) or ""
    answer = row[key] if isinstance(row[key], list) else [{"role": "assistant", "content": row[key]}]
    messages = conversation(row[names["prompt"]], "prompt") + conversation(answer, key)
    defined = tools(row[names["tools"]]) if "tools" in names else []
    return Parsed("prompt", _with_system(row, names, messages), defined)


def _qa(row: Row, names: dict[str, str]) -> Parsed:
    question, answer = _first(names, QUESTIONS), _first(names, ANSWERS)
    if not (question and answer):
        question, answer = names["input"], names["output"]
    return _pair("qa", row, names, question, answer)


def _pair(format: str, row: Row, names: dict[str, str], question: str, answer: str) -> Parsed:
    answers = _answers(row[answer], answer)
    turn = _turn(text_of(row[question], question), answers[0])
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
    return tuple(dict.fromkeys(text_of(one, name) for one in value)) or ("",)


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
    "prompt": _prompt,
    "prompt as messages": _prompt_messages,
    "qa": _qa,
    "text": _text,
    "columns": _columns,
}
