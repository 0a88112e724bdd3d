"""A conversation told another way, for templates that refuse it as it stands: same words, another form.

Contents given as lists of text parts become one text; none at all, as beside a tool call, becomes the empty text. Tool
calls get ids of nine letters and digits where theirs are missing or of another shape (Mistral's templates take no
others), and the results that answer them get the same. A template that takes no system text gets it before the first
question's words.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

Message = dict[str, Any]
_ID = re.compile(r"[A-Za-z0-9]{9}")


def mended(messages: list[Message]) -> list[Message]:
    """The messages in the plainest form, as many as before; equal to what was given where nothing can be done."""
    made: list[Message] = []
    waiting: list[tuple[str, str]] = []  # calls without a result yet: the id they had, the id they have
    for index, message in enumerate(messages):
        new = {**message, "content": _joined(message.get("content"))}
        if isinstance(calls := message.get("tool_calls"), list) and all(isinstance(call, dict) for call in calls):
            new["tool_calls"] = [{**call, "id": _id(call, index, at)} for at, call in enumerate(calls)]
            waiting = [
                (str(old.get("id")), str(call["id"])) for old, call in zip(calls, new["tool_calls"], strict=True)
            ]
        elif message.get("role") == "tool" and waiting:
            asked = str(message.get("tool_call_id"))
            at = next((at for at, (old, _) in enumerate(waiting) if old == asked), 0)
            new["tool_call_id"] = waiting.pop(at)[1]
        made.append(new)
    return made


def without_system(messages: list[Message]) -> list[Message]:
    """The messages with the system text before the first question's words, as Gemma 3 and Mistral write it."""
    if [message.get("role") for message in messages[:2]] != ["system", "user"]:
        return messages
    texts = [message.get("content") for message in messages[:2]]
    if not all(isinstance(text, str) for text in texts):
        return messages
    return [{**messages[1], "content": "\n\n".join(map(str, texts))}, *messages[2:]]


def _joined(content: Any) -> Any:
    """The texts of a list of parts, if they are all there is."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            return content
        texts.append(text)
    return "".join(texts)


def _id(call: dict[str, Any], message: int, at: int) -> str:
    if _ID.fullmatch(str(call.get("id"))):
        return str(call["id"])
    told = repr((call.get("id"), message, at, call.get("function", call)))
    return hashlib.blake2b(told.encode(errors="surrogatepass"), digest_size=8).hexdigest()[:9]
