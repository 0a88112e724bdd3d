"""A conversation told another way, for templates that refuse it as it stands: same words, another form.

Contents in parts become one text, reasoning and calls among them go to their own keys; none at all, as beside a tool
call, becomes the empty text. Tool calls get ids of nine letters and digits where theirs are missing or of another shape
(Mistral's templates take no others), and the results that answer them get the same. A template that takes no system
text gets it before the first question's words.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from sft.data.conversation import Message, conversation
from sft.data.faults import RowFault

_ID = re.compile(r"[A-Za-z0-9]{9}")


def mended(messages: list[Message]) -> list[Message]:
    """The messages in the plainest form, as many as before; equal to what was given where nothing can be done."""
    made: list[Message] = []
    waiting: list[tuple[str, str]] = []  # calls without a result yet: the id they had, the id they have
    for index, message in enumerate(map(_read, messages)):
        if isinstance(calls := message.get("tool_calls"), list) and all(isinstance(call, dict) for call in calls):
            ids = [_id(call, index, at) for at, call in enumerate(calls)]
            message["tool_calls"] = [{**call, "id": new} for call, new in zip(calls, ids, strict=True)]
            waiting = [(str(call.get("id")), new) for call, new in zip(calls, ids, strict=True)]
        elif message.get("role") == "tool" and waiting:
            asked = str(message.get("tool_call_id"))
            at = next((at for at, (old, _) in enumerate(waiting) if old == asked), 0)
            message["tool_call_id"] = waiting.pop(at)[1]
        made.append(message)
    return made


def without_system(messages: list[Message]) -> list[Message]:
    """The messages with the system text before the first question's words, as Gemma 3 and Mistral write it."""
    if [message.get("role") for message in messages[:2]] != ["system", "user"]:
        return messages
    texts = [message.get("content") for message in messages[:2]]
    if not all(isinstance(text, str) for text in texts):
        return messages
    return [{**messages[1], "content": "\n\n".join(map(str, texts))}, *messages[2:]]


def _read(message: Message) -> Message:
    """A message with its content as text: parts as the data room reads them, reasoning and calls in their own keys."""
    if message.get("content") is None:
        return {**message, "content": ""}
    if not isinstance(message["content"], list):
        return dict(message)
    try:
        (read,) = conversation([message], "messages")
    except RowFault:
        return dict(message)
    return {**message, **read, "role": message["role"]}


def _id(call: dict[str, Any], message: int, at: int) -> str:
    if _ID.fullmatch(str(call.get("id"))):
        return str(call["id"])
    told = repr((call.get("id"), message, at, call.get("function", call)))
    return hashlib.blake2b(told.encode(errors="surrogatepass"), digest_size=8).hexdigest()[:9]
