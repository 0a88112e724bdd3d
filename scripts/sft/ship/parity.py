"""Conversations whose ids every exported form must get right: systems, several turns, think blocks, tools, odd text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.chat.encode import Encoder
from sft.chat.template import ChatTemplate, Message, Refused
from sft.data import rows as records
from sft.errors import TemplateError
from sft.ship.gguf import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Row = dict[str, Any]
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _talk(name: str, *turns: tuple[str, str], tools: list[Any] | None = None) -> Row:
    row: Row = {"id": f"golden-{name}", "messages": [{"role": role, "content": text} for role, text in turns]}
    return {**row, "tools": tools} if tools else row


ROWS: tuple[Row, ...] = (
    _talk("plain", ("user", "What is the capital of France?"), ("assistant", "Paris.")),
    _talk(
        "system",
        ("system", "You answer in one word."),
        ("user", "What is the capital of France?"),
        ("assistant", "Paris"),
    ),
    _talk(
        "turns",
        ("system", "Be brief."),
        ("user", "Name a colour."),
        ("assistant", "Blue."),
        ("user", "Another one?"),
        ("assistant", "Red, then."),
        ("user", "And a number?"),
        ("assistant", "7"),
    ),
    _talk(
        "think",
        ("user", "17 - 9?"),
        ("assistant", "<think>\n17 minus 9 leaves 8.\n</think>\n\n8"),
        ("user", "And twice that?"),
        ("assistant", "<think>\nTwice 8 is 16.\n</think>\n\n16"),
    ),
    _talk(
        "text",
        ("user", "Ein Käse für Zoë, 東京 и Привет 🙂: 3 × €19.95?\n\n\tdef f(x):\n    return x  # twice  two"),
        ("assistant", '{"a": [1, 2.5e-3], "b": null}\n\n- one\n- two'),
    ),
    _talk("digits", ("user", "Order 1234567, due 2024-07-31, I'm sure it's HE'S."), ("assistant", "0048213")),
    _talk("tools", ("user", "Weather in Oslo?"), ("assistant", "I would have to look."), tools=[_WEATHER]),
)


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
            fix="FORMAT=gguf keeps the template as it is, and llama.cpp's server uses it",
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


log = logging.getLogger("sft.ship")
PARITY = "parity.json"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Route:
    """One way in which the exported model is used.

    ids: of messages (with tools), ending with the prompt for an answer or not. text: ids of a rendered text. Either
    raises Refused where it cannot hold a row. stops: the ids that end an answer.
    """

    name: str
    ids: Callable[[Messages, list[Any] | None, bool], list[int]]
    text: Callable[[str], list[int]]
    stops: frozenset[int]


@dataclass
class Certificate:
    """What was compared. rows: of training; compared: of them, by route; tokens: for all routes together."""

    routes: list[str]
    sources: list[str]
    rows: int = 0
    tokens: int = 0
    compared: dict[str, int] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    template: str = ""
    template_sha256: str = ""
    ids_sha256: str = ""
    stops: dict[str, list[int]] = field(default_factory=dict)
    equal: bool = False


def certify(encoder: Encoder, routes: Sequence[Route], rows: Sequence[Row], sources: list[str]) -> Certificate:
    """Compares every route with training on every row. Raises TemplateError at the first difference, told in tokens.

    encoder: the run's own, with room for any row.
    """
    made = Certificate([route.name for route in routes], sources)
    made.template, made.template_sha256 = encoder.template.name, encoder.template.digest
    made.stops = {"training": sorted(encoder.stops.ids), **{route.name: sorted(route.stops) for route in routes}}
    digest = hashlib.sha256()
    for row in rows:
        name = records.row_id(row)
        if reason := _unfit(encoder, row):
            made.set_aside[name] = reason
            continue
        try:
            known = _row(encoder, routes, row, name, made)
        except Refused as refused:
            made.set_aside[name] = str(refused)
            continue
        digest.update(json.dumps(known).encode())
        made.rows += 1
    made.ids_sha256 = digest.hexdigest()
    if lacking := [route.name for route in routes if not made.compared.get(route.name)]:
        reason = next(iter(made.set_aside.values()), "there are no rows")
        raise TemplateError(f"parity: nothing could be compared for {', '.join(lacking)}: {reason}", where="the export")
    made.equal = True
    log.info(f"parity: {made.tokens:,} tokens of {made.rows} rows are equal in {', '.join(made.routes)}")
    return made


def _row(encoder: Encoder, routes: Sequence[Route], row: Row, name: str, made: Certificate) -> list[int]:
    """Compares one row; returns its training ids."""
    encoded = encoder.encode(row)
    if encoded.dropped:
        raise Refused(encoded.dropped)
    prompt = encoder.prompt(row)
    whole = encoded.input_ids if encoder.kind == "causal" else []
    if whole and _asks_as_it_shows(encoder, row):
        _same(encoder, "infer", name, "the prompt", whole[: len(prompt)], prompt)
    ended = [label for label in encoded.labels if label >= 0][-1:]
    for route in routes:
        try:
            _one(encoder, route, row, name, whole, prompt)
        except Refused as refused:
            made.set_aside[f"{name} ({route.name})"] = str(refused)
            continue
        if ended and ended[0] in encoder.stops.ids and ended[0] not in route.stops:
            raise _other_stop(encoder, route, ended[0])
        made.compared[route.name] = made.compared.get(route.name, 0) + 1
        made.tokens += len(prompt) + len(whole)
    return whole or prompt


def _one(encoder: Encoder, route: Route, row: Row, name: str, whole: list[int], prompt: list[int]) -> None:
    """Compares a row's prompt, and the whole of it where training adds no end of its own."""
    if records.is_rendered(row):
        _same(encoder, route.name, name, "the prompt", prompt, route.text(str(row["input"])))
        return
    turns, tools = records.messages(row), records.tools(row)
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    _same(encoder, route.name, name, "the prompt", prompt, route.ids(asked, tools, True))
    if whole and encoder.template.style == "messages":
        shown = encoder.template.render(turns, tools=tools)
        if encoder.tokens.ids(shown) == whole:
            _same(encoder, route.name, name, "the conversation", whole, route.ids(turns, tools, False))


def _unfit(encoder: Encoder, row: Row) -> str | None:
    """Why a row cannot be compared: it holds control tokens as plain words, which no other program keeps plain."""
    if row.get("plain_spans"):
        return "control tokens stand in its words"
    if records.is_rendered(row):
        return None
    for turn in records.messages(row):
        pattern = encoder.vocabulary.controls(str(turn.get("role")))
        content = turn.get("content")
        if not isinstance(content, str):
            return "a turn of it is not text alone"
        if pattern is not None and pattern.search(content):
            return "control tokens stand in its words"
    return None


def _asks_as_it_shows(encoder: Encoder, row: Row) -> bool:
    """Whether the template's prompt is the beginning of what it shows (not so for some think templates)."""
    if records.is_rendered(row) or encoder.template.style == "turn":
        return True
    turns, tools = records.messages(row), records.tools(row)
    asked = encoder.template.render(turns[:-1], tools=tools, add_generation_prompt=True)
    return encoder.template.render(turns, tools=tools).startswith(asked)


def _same(encoder: Encoder, route: str, row: str, what: str, trained: list[int], found: list[int]) -> None:
    if trained == found:
        return
    at = next(
        (at for at, pair in enumerate(zip(trained, found, strict=False)) if pair[0] != pair[1]),
        min(len(trained), len(found)),
    )
    before = encoder.tokenizer.decode(trained[max(0, at - 8) : at])
    error = TemplateError(
        f"parity: in {route}, {what} is not what training showed; token {at} is {_token(encoder, found, at)},"
        f" training has {_token(encoder, trained, at)}\n"
        f"  before: ...{before!r}\n"
        f"  training: {encoder.tokenizer.decode(trained[at : at + 12])!r}\n"
        f"  {route}: {encoder.tokenizer.decode(found[at : at + 12])!r}",
        where=f"row {row}",
        fix="fix the exported template or tokenizer; nothing was exported. docs/SHIPPING.md tells the usual causes",
    )
    error.details = {"route": route, "row": row, "token": at, "training": trained, "exported": found}
    raise error


def _token(encoder: Encoder, ids: list[int], at: int) -> str:
    return f"{encoder.tokenizer.decode([ids[at]])!r} ({ids[at]})" if at < len(ids) else "missing"


def _other_stop(encoder: Encoder, route: Route, end: int) -> TemplateError:
    named = ", ".join(_token(encoder, [token], 0) for token in sorted(route.stops)) or "nothing"
    return TemplateError(
        f"parity: training ends answers with {_token(encoder, [end], 0)}, {route.name} stops at {named}: it would talk"
        " on",
        where=route.name,
        fix="put the token into generation_config.json (eos_token_id); nothing was exported",
    )


def of_folder(folder: Path, *, trust_remote_code: bool) -> Route:
    """A folder of safetensors as transformers, vLLM and TGI open it: AutoTokenizer and its `apply_chat_template`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    settings = folder / "generation_config.json"
    said = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id", []) if settings.is_file() else []
    stops = frozenset(said if isinstance(said, list) else [said])

    def ids(messages: Messages, tools: list[Any] | None, prompt: bool) -> list[int]:
        if tokenizer.chat_template is None:
            raise Refused("the folder has no chat template that other programs can use")
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        except Exception as error:
            raise TemplateError(
                f"parity: the exported template fails where training's does not: {' '.join(str(error).split())[:200]}",
                where=str(folder),
            ) from None
        made: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return made

    def text(rendered: str) -> list[int]:
        made: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
        return made

    return Route("safetensors", ids, text, stops)


def of_gguf(vocabulary: Vocabulary, source: str, tokenizer: PreTrainedTokenizerBase) -> Route:
    """llama.cpp with the file's own template: a begin token that it adds itself is taken off the text first."""
    special = {key: str(text) for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    template = ChatTemplate("the template in the GGUF file", source, special)
    text = _tokenised(vocabulary)

    def ids(messages: Messages, tools: list[Any] | None, prompt: bool) -> list[int]:
        return text(template.render(messages, tools=tools, add_generation_prompt=prompt))

    return Route("gguf", ids, text, frozenset(vocabulary.stops()))


def of_ollama(vocabulary: Vocabulary, template: GoTemplate, stops: list[str]) -> Route:
    """Ollama with the Modelfile's template and stop texts."""
    text = _tokenised(vocabulary)
    named = {at for at, token in enumerate(vocabulary.tokens) if token in stops}

    def ids(messages: Messages, tools: list[Any] | None, prompt: bool) -> list[int]:
        if tools:
            raise Refused("tools are not told in an Ollama template of ours")
        return text(template.render(messages, prompt=prompt))

    return Route("ollama", ids, text, frozenset(vocabulary.stops() | named))


def _tokenised(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    built = vocabulary.built()
    begin = vocabulary.tokens[vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else None

    def text(rendered: str) -> list[int]:
        made: list[int] = built.encode(rendered.removeprefix(begin or ""), add_special_tokens=False).ids
        return made if begin is None else [int(vocabulary.bos or 0), *made]

    return text
