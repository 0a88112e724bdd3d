"""One chat template: rendered as transformers' `apply_chat_template` renders it, for training and serving alike.

Two styles. A *messages* template loops over `messages`. A *turn* template names `system`, `user` and `assistant`, one
turn only; its prompt is all that it writes before the answer, spaces at the end left to the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
import jinja2.nodes

from sft.chat.purse import OutOfBounds
from sft.chat.sandbox import ChatEnvironment
from sft.errors import TemplateError

Message = dict[str, Any]
LARGEST_SOURCE = 1_000_000
_ANSWER = "\U000ffff2"  # stands for the answer where a turn template is rendered up to it


class Refused(Exception):
    """The template, or the proof of its labels, refuses one conversation; the text says why."""


@dataclass
class ChatTemplate:
    """A compiled template with its variables.

    name: for messages. source: the text. special: bos_token, eos_token and so on. options: `data.template_options`.
    tool_source: the variant used where a row has tools, for models that ship two. origin: it came with the model, is
    what is taken where none did, or was named in the config.
    control_text: what control tokens written inside a message become, plain text or the tokens.
    """

    name: str
    source: str
    special: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    tool_source: str | None = None
    origin: Literal["own", "default", "named"] = "named"
    path: Path | None = None
    control_text: Literal["plain", "token"] = "plain"
    parts: bool = False  # contents are given as [{"type": "text", "text": ...}]: the template wants it so

    def __post_init__(self) -> None:
        self._plain = self._compile(self.source)
        self._tools = self._compile(self.tool_source) if self.tool_source else None
        named = jinja2.meta.find_undeclared_variables(self.syntax())
        self.style: Literal["messages", "turn"] = "messages" if "messages" in named else "turn"
        if self.style == "turn" and "assistant" not in named:
            raise TemplateError(
                "the template never shows the answer: it uses neither `messages` nor `assistant`",
                where=self.name,
                mend="loop over `messages`, or write {{ system }}, {{ user }} and {{ assistant }}",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that decides the text: source, options and special tokens."""
        told = repr((self.source, self.tool_source, sorted(self.options.items()), sorted(self.special.items())))
        return hashlib.sha256(told.encode()).hexdigest()

    def syntax(self) -> jinja2.nodes.Template:
        """The template's syntax tree."""
        return self._plain.environment.parse(self.source)

    def render(
        self, messages: list[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Raises Refused where the template raises, TemplateError past its bounds."""
        return self.tracked(messages, tools, add_generation_prompt, tracks=False)

    def tracked(self, messages: list[Message], tools: list[Any] | None, prompt: bool, *, tracks: bool = True) -> str:
        """`render`, with private characters around {% generation %} blocks where `tracks`."""
        template = self._tools if tools and self._tools else self._plain
        if self.style == "turn":
            values, prompt = _turn(messages, tools, prompt)
        else:
            values = {"messages": _in_parts(messages) if self.parts else messages, "tools": tools, "documents": None}
        given = {**self.special, **values, "add_generation_prompt": prompt, **self.options}
        text = self._run(template, given, tracks)
        if self.style == "turn" and prompt:
            before, found, _ = text.partition(_ANSWER)
            if not found:
                raise Refused("the template does not show the answer of this row")
            return before.rstrip(" ")
        return text

    def _run(self, template: jinja2.Template, given: dict[str, Any], tracks: bool) -> str:
        environment = template.environment
        assert isinstance(environment, ChatEnvironment)
        try:
            with environment.bounded(tracks=tracks):
                pieces = []
                for piece in template.generate(given):
                    environment.purse.spend(len(piece))
                    pieces.append(piece)
                return "".join(pieces)
        except (OutOfBounds, MemoryError, RecursionError) as error:
            raise TemplateError(str(error) or type(error).__name__, where=f"{self.name}:{_line(error)}") from None
        except jinja2.TemplateError as error:
            raise Refused(f"the template refuses it ({self.name}:{_line(error)}): {error.message}") from None
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise Refused(f"the template fails on it ({self.name}:{_line(error)}): {said[:300]}") from None

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > LARGEST_SOURCE:
            raise TemplateError(f"the template has {len(source):,} characters", where=self.name)
        try:
            return ChatEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            shown = source.splitlines()[error.lineno - 1].strip() if source.splitlines() else ""
            raise TemplateError(
                f"template syntax: {error.message}",
                where=f"{self.name}:{error.lineno}: {shown[:120]}",
                mend="mend that line, or take another template: --set data.template_path=chatml",
            ) from None
        except (RecursionError, MemoryError, ValueError, jinja2.TemplateError) as error:
            raise TemplateError(f"the template does not compile: {error}", where=self.name) from None


def _turn(messages: list[Message], tools: list[Any] | None, prompt: bool) -> tuple[dict[str, Any], bool]:
    """system, user and assistant of a conversation of one turn; whether the text ends before the answer."""
    roles = [message.get("role") for message in messages]
    turn = roles[1:] if roles[:1] == ["system"] else roles
    if turn not in (["user"], ["user", "assistant"]) or tools:
        shape = "tools" if tools else f"the roles {', '.join(map(str, roles)) or 'none'}"
        raise Refused(f"the template takes one system, user and assistant text; this row has {shape}")
    texts = {str(message["role"]): _text(message.get("content")) for message in messages}
    prompt = prompt or "assistant" not in texts
    if prompt:
        texts["assistant"] = _ANSWER
    return {"system": "", **texts}, prompt


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _in_parts(messages: list[Message]) -> list[Message]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _line(error: BaseException) -> str:
    """The line of the template that an error comes from, as jinja puts it into the traceback; `?` if unknown."""
    trace, line = error.__traceback__, "?"
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = str(trace.tb_lineno)
        trace = trace.tb_next
    return line
