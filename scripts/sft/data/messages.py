"""Turns as data sets store them (messages, sharegpt, content in parts, many spellings of tool calls), normalised to
`{"role": system|user|assistant|tool, "content": str, "tool_calls"?, "reasoning_content"?, "name"?, ...}`.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from contextlib import suppress
from typing import Any

from sft.data.rows import Message, RowFault, parse_json, to_weight

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "usr", "customer", "client"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai", "agent", "operator"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("question", "answer"))
SPEAKER_KEYS = ("role", "from", "sender", "speaker")
CONTENT = ("content", "value", "parts", "text")
REASONING = ("reasoning_content", "reasoning", "thinking")
COPIED = ("name", "tool_call_id")
TRAINED = ("train", "training", "loss")  # true or false, as Axolotl and ms-swift write it
TYPES = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false", bytes: "bytes"}
MEDIA_MARK = re.compile(r"^\s*<(?:image|audio|video)>|<image>\s*$")  # as LLaVA and ms-swift write it
BEFORE = {  # role -> the roles that it may follow
    "system": (), "user": ("system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
}  # fmt: skip


def to_text(value: Any, where: str) -> str:
    """The text of a field: numbers and booleans as JSON writes them, null is empty. Raises RowFault for the rest."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise RowFault("not text", f"{where} is {_type(value)}, not text")


def normalize_messages(turns: Any, where: str) -> list[Message]:
    """The turns of one row. A function call as a turn of its own joins the assistant turn before it."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a cell of a table
        turns = _as_list(turns, where, "list of turns")
    if not isinstance(turns, list):
        raise RowFault("unknown format", f"{where} is {_type(turns)}, not a list of turns")
    by_turns = all(isinstance(turn, str) for turn in turns)  # texts alone, as in LIMA
    for pair in PAIRS:  # a question and its answer in one, as in Firefly and Capybara
        if turns and all(isinstance(turn, dict) and turn.keys() >= {*pair} for turn in turns):
            turns, by_turns = [turn[key] for turn in turns for key in pair], True
            break
    if by_turns:
        turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        message, is_call = _message(turn, f"{where}[{number}]")
        if is_call and messages and messages[-1]["role"] == "assistant":
            messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def _message(turn: Any, where: str) -> tuple[Message, bool]:
    """The turn, and whether it is nothing but a function call."""
    if not isinstance(turn, dict):
        raise RowFault("unknown format", f"{where} is {_type(turn)}, not a turn")
    name = next((turn[key] for key in SPEAKER_KEYS if key in turn), None)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        what = f"the role {name!r}: who asks is `user`, who answers `assistant`" if name else "no `role` or `from`"
        raise RowFault("unknown role", f"{where} has {what}")
    content = next((turn[key] for key in CONTENT if key in turn), None)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": normalize_tool_calls(content, where)}, True
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    parts: Message = _parts(content, where) if isinstance(content, list) else {"content": to_text(content, where)}
    message: Message = {"role": role, "content": parts["content"]}
    reasoning = next((turn[key] for key in REASONING if turn.get(key) is not None), parts.get("reasoning_content"))
    if text := to_text(reasoning, where):
        message["reasoning_content"] = text
    fields = (turn.get("tool_calls"), turn.get("function_call"))
    if calls := next(filter(None, (normalize_tool_calls(field, where) for field in fields)), parts.get("tool_calls")):
        message["tool_calls"] = calls
    if (weight := turn.get("weight")) is not None:
        message["weight"] = to_weight(weight, f"{where}.weight")
    elif any(turn.get(key) is False for key in TRAINED):
        message["weight"] = 0
    return message | {key: turn[key] for key in COPIED if turn.get(key) is not None}, False


def _parts(parts: list[Any], where: str) -> Message:
    """Content in parts: texts are joined unchanged, reasoning and tool calls go to keys of their own."""
    message: Message = {"content": ""}
    for item in parts:
        part = {"text": item} if isinstance(item, str) else item
        keys = part.keys() if isinstance(part, dict) else {}
        kind = part["type"] if "type" in keys else "text" if {"text", "value", "content"}.intersection(keys) else None
        if kind in ("text", "input_text", "output_text"):
            message["content"] += to_text(part.get("text", part.get("value", part.get("content"))), where)
        elif kind in ("reasoning", "thinking"):
            thought = to_text(part.get("value", part.get("text", part.get(kind))), where)
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind in ("tool_call", "function_call", "tool_calls"):
            calls = normalize_tool_calls(part.get("value", part.get(kind)), where)
            message["tool_calls"] = [*message.get("tool_calls", ()), *calls]
        else:
            what = f"of the type {kind!r}" if kind else f"with {', '.join(keys) or _type(part)}"
            raise RowFault("not text", f"{where} has a part {what}: only text is trained on")
    return message


def normalize_tool_calls(value: Any, where: str) -> list[Message]:
    """Tool calls as chat templates read them: `{"type": "function", "function": {"name", "arguments": {}}}`."""
    calls = []
    for call in _as_list(value, where, "tool call"):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault("unreadable", f"{where} has a tool call without a function's name")
        arguments = function.get("arguments", function.get("parameters", {}))
        with suppress(RowFault):
            parsed = parse_json(arguments) if isinstance(arguments, str) else None
            arguments = parsed if isinstance(parsed, dict) else arguments
        if isinstance(arguments, dict):  # a typed table (Parquet) fills in null for keys that a row does not have
            arguments = {key: item for key, item in arguments.items() if item is not None}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        if isinstance(call.get("id"), str):
            calls[-1] = {"id": call["id"], **calls[-1]}
    return calls


def normalize_tools(value: Any) -> list[Message]:
    """Definitions of tools, as OpenAI writes them: bare function objects are wrapped, JSON text is parsed."""
    tools = [tool for tool in _as_list(value, "tools", "list of tools") if tool != {}]
    for tool in tools:
        if not isinstance(tool, dict):
            raise RowFault("unreadable", f"tools holds {_type(tool)}, not a tool")
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]


def check_turns(messages: list[Message]) -> None:
    """Raises RowFault unless: system at most once and first, a user turn, answers after questions, an answer last."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise RowFault("no user turn", "there is no user turn")
    start = 1 if roles[0] == "system" else 0
    for number, message in enumerate(messages[start:], start):
        role, before = message["role"], roles[number - 1] if number > start else "system"
        name = f"turn {number + 1}"
        if before not in BEFORE[role]:
            what = f"{name} is {role} after {before}" if number > start else f"the first turn is of the {role}"
            raise RowFault("roles out of order", f"{what}: questions and answers take turns, a question first")
        empty = not message["content"].strip()
        if role == "user" and (mark := MEDIA_MARK.search(message["content"])):
            what = f"{name} holds {mark[0].strip()}, the place of media: only text is trained on"
            raise RowFault("not text", what)
        if role == "user" and empty:
            raise RowFault("no user turn", f"{name} (user) is empty")
        if role == "assistant" and empty and not message.get("tool_calls"):
            raise RowFault("empty answer", f"{name} (assistant) is empty")
    if roles[-1] != "assistant":
        raise RowFault("empty answer", f"the last turn has the role {roles[-1]}: there is no answer")


def _as_list(value: Any, where: str, what: str) -> list[Any]:
    """A list, one item, or either of them as JSON text; null and empty text give no items."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except RowFault as fault:
            value = _python_literal(value)  # as pandas writes a list into a cell of a table
            if value is None:
                raise RowFault("unreadable", f"{where}: the {what} is not JSON ({fault.detail})") from None
    return [] if value is None else value if isinstance(value, list) else [value]


def _python_literal(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or dict that Python's `repr` wrote; None for any other text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in the text
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, (list, dict)) else None


def _type(value: Any) -> str:
    return TYPES.get(type(value), f"a {type(value).__name__}")
