"""Turns as people store them (messages, sharegpt, content in parts, tool calls in many spellings) to one kind:
`{"role": system|user|assistant|tool, "content": str, "tool_calls"?, "reasoning_content"?, "name"?, ...}`.
"""

from __future__ import annotations

import json
from typing import Any

from sft.data import readers
from sft.data.ledger import NOT_TEXT, OUT_OF_ORDER, UNKNOWN_FORMAT, UNKNOWN_ROLE, UNREADABLE, RowFault

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "usr"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
KEPT = ("name", "tool_call_id", "weight")
KINDS = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false", bytes: "bytes"}
BEFORE = {  # role -> the roles that it may follow
    "system": (), "user": ("system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
}  # fmt: skip


def text_of(value: Any, where: str) -> str:
    """A text field's text: numbers and true/false as JSON writes them, None as nothing. Anything else is a fault."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise RowFault(NOT_TEXT, f"{where} is {_kind(value)}, not text")


def conversation(turns: Any, where: str) -> list[Message]:
    """The turns of one row, each normalised; a call of a function joins the assistant turn before it."""
    if not isinstance(turns, list):
        raise RowFault(UNKNOWN_FORMAT, f"{where} is {_kind(turns)}, not a list of turns")
    made: list[Message] = []
    for number, turn in enumerate(turns, 1):
        message = _message(turn, f"{where}[{number - 1}]")
        if message.pop("joins", False) and made and made[-1]["role"] == "assistant":
            made[-1]["tool_calls"] = [*made[-1].get("tool_calls", ()), *message["tool_calls"]]
        else:
            made.append(message)
    return made


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowFault(UNKNOWN_FORMAT, f"{where} is {_kind(turn)}, not a turn")
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise RowFault(UNKNOWN_ROLE, f"{where} has the role {said!r}")
    content = turn.get("content", turn.get("value", turn.get("text")))
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": calls(content, where), "joins": True}
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    parts: Message = _parts(content, where) if isinstance(content, list) else {"content": text_of(content, where)}
    message: Message = {"role": role, "content": parts["content"]}
    thoughts = (turn[key] for key in REASONING if turn.get(key) is not None)
    if reasoning := text_of(next(thoughts, parts.get("reasoning_content")), where):
        message["reasoning_content"] = reasoning
    called = calls(turn.get("tool_calls"), where) or calls(turn.get("function_call"), where) or parts.get("tool_calls")
    if called:
        message["tool_calls"] = called
    return message | {key: turn[key] for key in KEPT if turn.get(key) is not None}


def _parts(parts: list[Any], where: str) -> Message:
    """Content in parts: texts are joined as they stand, reasoning and tool calls go to their own keys."""
    made: Message = {"content": ""}
    for part in parts:
        if isinstance(part, str):
            made["content"] += part
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text"):
            made["content"] += text_of(part.get("text", part.get("value", part.get("content"))), where)
        elif kind in ("reasoning", "thinking"):
            thought = text_of(part.get("value", part.get("text", part.get(kind))), where)
            made["reasoning_content"] = made.get("reasoning_content", "") + thought
        elif kind in ("tool_call", "function_call", "tool_calls"):
            made["tool_calls"] = [*made.get("tool_calls", ()), *calls(part.get("value", part.get(kind)), where)]
        else:
            raise RowFault(NOT_TEXT, f"{where} has a part of the type {kind!r}")
    return made


def calls(value: Any, where: str) -> list[Message]:
    """Tool calls as chat templates read them: `{"type": "function", "function": {"name", "arguments": {}}}`."""
    value = _from_json(value, where, "tool call")
    if value is None or value == []:
        return []
    made = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, str) and isinstance(call, dict):
            function = {"name": function, "arguments": call.get("arguments", {})}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(UNREADABLE, f"{where} has a tool call without a function's name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _arguments(arguments)
        if isinstance(arguments, dict):  # a typed table (Parquet) fills in None for keys that a row has not
            arguments = {key: item for key, item in arguments.items() if item is not None}
        made.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        if isinstance(call.get("id"), str):
            made[-1] = {"id": call["id"], **made[-1]}
    return made


def _arguments(text: str) -> Any:
    try:
        value = readers.parse(text)
    except RowFault:
        return text
    return value if isinstance(value, dict) else text


def tools(value: Any) -> list[Message]:
    """Definitions of tools, as OpenAI writes them; bare function objects are wrapped, a JSON text is read."""
    value = _from_json(value, "tools", "list of tools")
    if value is None or value in ([], {}):
        return []
    made = []
    for tool in value if isinstance(value, list) else [value]:
        if not isinstance(tool, dict):
            raise RowFault(UNREADABLE, f"tools holds {_kind(tool)}, not a tool")
        made.append(tool if "function" in tool or "type" in tool else {"type": "function", "function": tool})
    return made


def _from_json(value: Any, where: str, what: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return readers.parse(value)
    except RowFault as fault:
        raise RowFault(UNREADABLE, f"{where}: the {what} is not JSON ({fault.detail})") from None


def check(messages: list[Message]) -> None:
    """Raises RowFault unless: system at most once and first, then user, answers after questions, an answer last."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise RowFault("no user turn", "nobody asks anything")
    start = 1 if roles[0] == "system" else 0
    for number, message in enumerate(messages[start:], start):
        role, before = message["role"], roles[number - 1] if number > start else "system"
        if before not in BEFORE[role]:
            raise RowFault(OUT_OF_ORDER, f"turn {number + 1} is {role} after {before if number else 'nothing'}")
        blank = not message["content"].strip()
        if role == "user" and blank:
            raise RowFault("no user turn", f"turn {number + 1} (user) is empty")
        if role == "assistant" and blank and not message.get("tool_calls"):
            raise RowFault("empty answer", f"turn {number + 1} (assistant) is empty")
    if roles[-1] != "assistant":
        raise RowFault("empty answer", f"the last turn is of the role {roles[-1]}: nobody answers")


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")
