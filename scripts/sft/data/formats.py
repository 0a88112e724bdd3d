"""Formats of raw rows: one table says which keys each has, which rows it fits, and how its turns are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from sft.data.ledger import EMPTY_ANSWER, NO_USER_TURN, UNKNOWN_FORMAT, RowFault
from sft.data.messages import ROLES, Message, conversation, text_of, tools
from sft.errors import DataError


class TextTemplate(NamedTuple):
    """A chat template that `{"text": ...}` rows are rendered with, known by its control tokens.

    turn: starts a turn; its group is the role. end: closes a turn. strip: whether white space around a turn's text
    belongs to the template.
    """

    name: str
    turn: re.Pattern[str]
    end: re.Pattern[str]
    strip: bool = False


TEXT_TEMPLATES = (
    TextTemplate("chatml", re.compile(r"<\|im_start\|>\s*(\w+)[ \t]*\n"), re.compile(r"<\|im_end\|>")),
    TextTemplate(
        "llama3",
        re.compile(r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>(?:\n\n)?"),
        re.compile(r"<\|e(?:ot_id|om_id|nd_of_text)\|>"),
    ),
    TextTemplate("gemma", re.compile(r"<start_of_turn>(\w+)\n"), re.compile(r"<end_of_turn>")),
    TextTemplate(
        "phi3", re.compile(r"<\|(system|user|assistant)\|>[ \t]*\n?"), re.compile(r"<\|end\|>|</s>"), strip=True
    ),
)
TEXT_BEGIN = re.compile(r"^(?:\s|<\|begin_of_text\|>|<\|endoftext\|>|<s>|<bos>|\[gMASK\]|<sop>)+")
TEXT_END = re.compile(r"(?:\s|<\|end_of_text\|>|<\|endoftext\|>|<\|eot_id\|>|<\|im_end\|>|</s>|<eos>)+$")
LLAMA2_SYSTEM = re.compile(r"<<SYS>>\s*(.*?)\s*<</SYS>>\s*(.*)", re.DOTALL)


def parse_text(text: str) -> tuple[str, list[Message]]:
    """The template's name and the turns of a text rendered with control tokens.

    Raises RowFault (unknown format) for any other text: where one turn ends and the next begins would be a guess.
    """
    text = TEXT_BEGIN.sub("", text)
    if text.startswith("[INST]"):
        return "llama2", _llama2_turns(text)
    for template in TEXT_TEMPLATES:
        if template.turn.match(text):
            return template.name, _template_turns(template, text)
    names = ", ".join(["llama2", *(template.name for template in TEXT_TEMPLATES)])
    what = f"a text that does not begin with the control tokens of a chat template ({names}): {text.strip()[:60]!r}"
    raise RowFault(UNKNOWN_FORMAT, f"{what}; plain text can be mixed in with data.replay.path")


def _template_turns(template: TextTemplate, text: str) -> list[Message]:
    turns: list[Message] = []
    starts = list(template.turn.finditer(text))
    bounds = [*(start.start() for start in starts[1:]), len(text)]
    for start, bound in zip(starts, bounds, strict=True):
        content, end, rest = _split_at(template.end, text[start.end() : bound])
        rest = TEXT_END.sub("", TEXT_BEGIN.sub("", rest)).strip()
        if rest or (not end and bound < len(text)):
            what = f"text between two turns: {rest[:60]!r}" if rest else f"turn {len(turns) + 1} is not closed"
            raise RowFault(UNKNOWN_FORMAT, f"{template.name} template: {what}")
        content = content if end else TEXT_END.sub("", content)
        role = start.group(1).lower()
        turns.append({"role": ROLES.get(role, role), "content": content.strip() if template.strip else content})
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def _split_at(pattern: re.Pattern[str], text: str) -> tuple[str, str, str]:
    match = pattern.search(text)
    return (text[: match.start()], match.group(), text[match.end() :]) if match else (text, "", "")


def _llama2_turns(text: str) -> list[Message]:
    """`<s>[INST] <<SYS>> system <</SYS>> question [/INST] answer </s>`, as Llama 2 and Mistral write it."""
    turns: list[Message] = []
    rounds = text.split("[INST]")[1:]
    for number, exchange in enumerate(rounds, 1):
        user, closed, answer = exchange.partition("[/INST]")
        ended = re.search(r"</s>(?:\s|<s>)*$", answer)
        if not closed or "[/INST]" in answer or (number < len(rounds) and not ended):
            raise RowFault(UNKNOWN_FORMAT, f"llama2 template: exchange {number} is not closed by [/INST] and </s>")
        system = LLAMA2_SYSTEM.match(user.strip()) if number == 1 else None
        if system:
            turns.append({"role": "system", "content": system.group(1)})
            user = system.group(2)
        turns.append({"role": "user", "content": user.strip()})
        answer = re.sub(r"(?:\s|</s>|<s>)+$", "", answer).strip()
        if answer or number < len(rounds):
            turns.append({"role": "assistant", "content": answer})
    return turns


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
    style, messages = parse_text(text_of(row[names["text"]], "text"))
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


MOST_PLANS = 1_000  # different sets of keys remembered
MOST_KEYS = 20  # unread keys of a row that are told
ASKING = ("user", "prompt", *QUESTIONS)
GIVING = ("assistant", "completion", *ANSWERS)
EVERY_FORMAT = ("id", "origin", *SYSTEM)  # read whatever the format is
STORED = ("tags", "tag", "category", "references", "weight")  # copied to the stored row as they are
UNUSED = ("weight",)  # of these, what training does not use


class Formats:
    """Turns raw rows into turns. format: `auto` or the one to hold every row to. columns: role -> column's name."""

    def __init__(self, format: str, columns: dict[str, str] | None) -> None:
        if (columns or format == "columns") and not {"user", "assistant"} <= set(columns or ()):
            fix = "--set data.columns.user=NAME --set data.columns.assistant=NAME"
            raise DataError("data.columns must name the columns of user and assistant", where="data.columns", fix=fix)
        self._format, self._columns = format, columns
        self._plans: dict[tuple[str, ...], tuple[dict[str, str], str, list[str]]] = {}
        self.unread: Counter[str] = Counter()  # key -> rows in which nobody read it

    def parse(self, row: Any) -> Parsed:
        """The row's turns. Raises RowFault where the format is not known or a field is not text."""
        if not isinstance(row, dict):
            raise RowFault(UNKNOWN_FORMAT, "not an object with keys")
        keys = tuple(row)
        if keys not in self._plans:
            if len(self._plans) > MOST_PLANS:
                self._plans.clear()
            names = _names(keys)
            self._plans[keys] = names, *self._choice(row, names)
        names, format, unread = self._plans[keys]
        self.unread.update(unread)
        if format == "prompt" and in_turns(row, names):
            format = "prompt as messages"
        return READERS[format](row, self._columns if format == "columns" and self._columns else names)

    def _choice(self, row: Row, names: dict[str, str]) -> tuple[str, list[str]]:
        """The format of rows with these keys, and the keys that it does not read."""
        format = self._choose(row, names)
        if format == "columns":
            used = {key: key for key in (self._columns or {}).values()}
        else:
            used = {key: key for name, key in names.items() if name in (*EVERY_FORMAT, *READ[format])}
        return format, [key for key in row if key not in used and (key not in STORED or key in UNUSED)][:MOST_KEYS]

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
        asks, gives = first(names, ASKING), first(names, GIVING)
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


def _has(*groups: tuple[str, ...]) -> Callable[[dict[str, str], Row], bool]:
    return lambda names, _row: all(first(names, group) for group in groups)


def _turns_of(names: dict[str, str], row: Row, key: str) -> bool:
    """Whether the row has a list of turns whose first is told by `role` or by `from`, as `key` says."""
    name = first(names, TURNS)
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
        "instruction" in names and ("output" in names or ("response" in names and bool(first(names, INPUTS))))
    ),
    "prompt": _has(("prompt",), COMPLETIONS),
    "qa": lambda names, row: (
        bool(first(names, QUESTIONS) and first(names, ANSWERS)) or {"input", "output"} <= names.keys()
    ),
    "text": lambda names, row: "text" in names and not first(names, (*ASKING, *GIVING)),
}
