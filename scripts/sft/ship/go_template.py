"""A chat template told in Go's template language, as Ollama's Modelfile wants it: what stands between the messages.

The pieces are found by rendering marked messages; whether they tell the whole template is for the parity certificate to
say, which compares the two on every row. Ollama has no word for tools here, and none that trims a message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from sft.chat.template import ChatTemplate, Message, Refused
from sft.errors import TemplateError

_SYSTEM, _USER, _ANSWER, _AGAIN = "\ue000Wfgh", "\ue000Kquv", "\ue000Zbmt", "\ue000Rdxy"


@dataclass(frozen=True)
class GoTemplate:
    """Text before a system message, before the first user's (with no system before it, with one), before a later one
    (None: one turn is all), before an answer, at the end of a prompt, at the end of a conversation.
    """

    system: str | None
    first: str
    after_system: str
    again: str | None
    answer: str
    prompt: str
    end: str

    def text(self) -> str:
        """The Go template; every literal is quoted, so that no white space is trimmed or added."""
        again = _say(self.again)
        system = "" if self.system is None else f'{{{{ if eq .Role "system" }}}}{_say(self.system)}{{{{ .Content }}}}'
        return (
            '{{ $last := "" }}{{ range .Messages }}'
            + (system + "{{ else " if system else "{{ ")
            + f'if eq .Role "user" }}}}{{{{ if eq $last "" }}}}{_say(self.first)}{{{{ else if eq $last "system" }}}}'
            + f"{_say(self.after_system)}{{{{ else }}}}{again}{{{{ end }}}}{{{{ .Content }}}}"
            + f'{{{{ else if eq .Role "assistant" }}}}{_say(self.answer)}{{{{ .Content }}}}{{{{ end }}}}'
            + "{{ $last = .Role }}{{ end }}"
            + f'{{{{ if eq $last "user" }}}}{_say(self.prompt)}{{{{ end }}}}'
        )

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """What Ollama makes of the messages; `prompt` false: with the end of the last answer. Raises Refused."""
        made, last = "", ""
        for message in messages:
            role = str(message["role"])
            before = {"system": self.system, "assistant": self.answer}.get(role)
            if role == "user":
                before = {"": self.first, "system": self.after_system}.get(last, self.again)
            if before is None or (role == "system" and last):
                raise Refused(f"an Ollama template of this one has no place for {role} after {last or 'the beginning'}")
            made, last = made + before + str(message.get("content") or ""), role
        return made + (self.prompt if last == "user" and prompt else "" if prompt else self.end)


def translate(template: ChatTemplate, begin: str) -> GoTemplate:
    """The pieces of a template. begin: the begin token that llama.cpp itself puts first, "" where it puts none.

    Raises TemplateError where the template shows no plain turn piece by piece.
    """
    user: Message = {"role": "user", "content": _USER}
    answer: Message = {"role": "assistant", "content": _ANSWER}
    try:
        asked = template.render([user], add_generation_prompt=True)
        first, prompt = _around(asked, _USER)
        once = template.render([user, answer])
        between, end = _around(once[len(_around(once, _USER)[0]) + len(_USER) :], _ANSWER)
    except (Refused, ValueError) as refused:
        raise TemplateError(
            f"{template.name} cannot be told as an Ollama template: {refused}",
            where=template.name,
            mend="FORMAT=gguf keeps the template as it is, and llama.cpp's server uses it",
        ) from None
    system, after = _system(template, user)
    return GoTemplate(
        None if system is None else system.removeprefix(begin),
        first.removeprefix(begin),
        after,
        _again(template, user, answer),
        between,
        prompt,
        end,
    )


def _system(template: ChatTemplate, user: Message) -> tuple[str | None, str]:
    try:
        text = template.render([{"role": "system", "content": _SYSTEM}, user], add_generation_prompt=True)
        before, rest = _around(text, _SYSTEM)
        return before, _around(rest, _USER)[0]
    except (Refused, ValueError):
        return None, ""


def _again(template: ChatTemplate, user: Message, answer: Message) -> str | None:
    try:
        text = template.render([user, answer, {"role": "user", "content": _AGAIN}], add_generation_prompt=True)
        return _around(_around(text, _ANSWER)[1], _AGAIN)[0]
    except (Refused, ValueError):
        return None


def _around(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError("it does not show every message once")
    return before, after


def _say(text: str | None) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str | None) -> str:
    """A Go string: JSON's escapes are Go's where nothing is escaped that need not be."""
    return json.dumps(text or "", ensure_ascii=False)
