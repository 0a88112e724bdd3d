"""Proof that an exported model gets the same token ids as in training: every route is compared on every row.

A route is a way in which the exported model is used: the folder in transformers or vLLM, the GGUF file in llama.cpp,
the Modelfile in Ollama. `golden_rows.jsonl` has rows that every export must get right: system texts, several turns,
think blocks, tools, unusual text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.chat.encode import Encoder
from sft.chat.template import ChatTemplate, Message, Refused
from sft.data import rows as records
from sft.errors import ModelError, TemplateError, one_line
from sft.files import read_json
from sft.model.gguf import PRE_TOKENIZERS, Vocabulary, first_unequal
from sft.ship.gguf import stop_ids

log = logging.getLogger("sft.ship")
Row = dict[str, Any]
TextIds = Callable[[str], list[int]]
Messages = list[Message]
Tools = list[Any] | None
_GOLDEN = Path(__file__).with_name("golden_rows.jsonl")
GOLDEN_ROWS: tuple[Row, ...] = tuple(json.loads(line) for line in _GOLDEN.read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Route:
    """ids: of messages and tools, with the prompt for an answer at the end or not; raises Refused for a row that the
    route cannot express. text_ids: of a rendered text. stops: the ids that end an answer.
    """

    name: str
    ids: Callable[[Messages, Tools, bool], list[int]]
    text_ids: TextIds
    stops: frozenset[int]


@dataclass
class Certificate:
    """The content of parity.json. rows: compared with training; compared: of them, by route; tokens: over all routes.

    set_aside: row (and route) -> why it cannot be compared.
    """

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
    """Compares every route with training on every row. encoder: the run's own, for rows of any length.

    Raises TemplateError at the first difference, shown in tokens, and if a route could not be compared at all.
    """
    certificate = Certificate([route.name for route in routes], sources)
    certificate.template, certificate.template_sha256 = encoder.template.name, encoder.template.digest
    certificate.stops = {"training": sorted(encoder.stops.ids), **{r.name: sorted(r.stops) for r in routes}}
    digest = hashlib.sha256()
    for row in rows:
        name = records.row_id(row)
        try:
            ids = _compare_row(encoder, routes, row, name, certificate)
        except Refused as refused:
            certificate.set_aside[name] = str(refused)
            continue
        digest.update(json.dumps(ids).encode())
        certificate.rows += 1
    certificate.ids_sha256 = digest.hexdigest()
    if missing := [route.name for route in routes if not certificate.compared.get(route.name)]:
        reason = next(iter(certificate.set_aside.values()), "there are no rows")
        raise TemplateError(f"parity: no row could be compared for {', '.join(missing)}: {reason}", where="the export")
    certificate.equal = True
    log.info(
        f"parity: {certificate.tokens:,} tokens of {certificate.rows} rows are equal in {', '.join(certificate.routes)}"
    )
    return certificate


def _compare_row(encoder: Encoder, routes: Sequence[Route], row: Row, name: str, certificate: Certificate) -> list[int]:
    """Compares one row's prompt over all routes, and the whole conversation where training adds no end token of its
    own; returns its training ids. Raises Refused if no route can express it.
    """
    _refuse_plain_control_tokens(encoder, row)
    encoded = encoder.encode(row)
    if encoded.dropped:
        raise Refused(encoded.dropped)
    prompt = encoder.prompt(row)
    whole = encoded.input_ids if encoder.kind == "causal" else []
    end = next((label for label in reversed(encoded.labels) if label >= 0), None)
    rendered = records.is_rendered(row)
    turns = [] if rendered else records.messages(row)
    before_answer, tools = ([], None) if rendered else records.prompt_messages(row)
    in_template = bool(whole) and not rendered and encoder.template.style == "messages"
    in_template = in_template and encoder.tokens.ids(encoder.template.render(turns, tools=tools)) == whole
    for route in routes:
        try:
            ids = route.text_ids(str(row["input"])) if rendered else route.ids(before_answer, tools, True)
            _require_equal(encoder, route.name, name, "the prompt", prompt, ids)
            if in_template:
                _require_equal(encoder, route.name, name, "the conversation", whole, route.ids(turns, tools, False))
        except Refused as refused:
            certificate.set_aside[f"{name} ({route.name})"] = str(refused)
            continue
        if end in encoder.stops.ids and end not in route.stops:
            stops = ", ".join(_token(encoder, [token], 0) for token in sorted(route.stops)) or "nothing"
            raise TemplateError(
                f"parity: training ends answers with {_token(encoder, [end], 0)}, but {route.name} stops at {stops}:"
                " its answers would go on",
                where=route.name,
                fix="put the token into generation_config.json (eos_token_id); nothing was exported",
            )
        certificate.compared[route.name] = certificate.compared.get(route.name, 0) + 1
        certificate.tokens += len(prompt) + len(whole)
    return whole or prompt


def _refuse_plain_control_tokens(encoder: Encoder, row: Row) -> None:
    """Raises Refused for a row whose words contain control tokens: only sft-play keeps those plain text."""
    contains = bool(row.get("plain_spans"))
    for turn in [] if records.is_rendered(row) else records.messages(row):
        pattern, content = encoder.vocabulary.controls(str(turn.get("role"))), turn.get("content")
        if not isinstance(content, str):
            raise Refused("one of its turns has more than text")
        contains |= pattern is not None and pattern.search(content) is not None
    if contains:
        raise Refused("its words contain control tokens")


def _require_equal(encoder: Encoder, route: str, row: str, what: str, trained: list[int], exported: list[int]) -> None:
    if trained == exported:
        return
    at = first_unequal(trained, exported)

    def shown(ids: list[int]) -> str:
        return repr(encoder.tokenizer.decode(ids))

    error = TemplateError(
        f"parity: in {route}, {what} differs from training; token {at} is {_token(encoder, exported, at)},"
        f" training has {_token(encoder, trained, at)}\n"
        f"  before: ...{shown(trained[max(0, at - 8) : at])}\n"
        f"  training: {shown(trained[at : at + 12])}\n"
        f"  {route}: {shown(exported[at : at + 12])}",
        where=f"row {row}",
        fix="correct the exported template or tokenizer; nothing was exported. docs/SHIPPING.md has the usual causes",
    )
    error.details = {"route": route, "row": row, "token": at, "training": trained, "exported": exported}
    raise error


def _token(encoder: Encoder, ids: list[int], at: int) -> str:
    return f"{encoder.tokenizer.decode([ids[at]])!r} ({ids[at]})" if at < len(ids) else "missing"


# --- the routes


def route_of_folder(folder: Path, *, trust_remote_code: bool) -> Route:
    """A folder of safetensors as transformers, vLLM and TGI open it: AutoTokenizer and its `apply_chat_template`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    ends = read_json(folder / "generation_config.json").get("eos_token_id", [])

    def text_ids(rendered: str) -> list[int]:
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    def ids(messages: Messages, tools: Tools, prompt: bool) -> list[int]:
        if tokenizer.chat_template is None:
            raise Refused("the folder has no chat template that other programs can use")
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        except Exception as error:
            reason = one_line(error)
            raise TemplateError(f"parity: the exported template fails on a row: {reason}", where=str(folder)) from None
        return text_ids(text)

    return Route("safetensors", ids, text_ids, frozenset(ends if isinstance(ends, list) else [ends]))


def route_of_gguf(
    vocabulary: Vocabulary, source: str, tokenizer: PreTrainedTokenizerBase, text_ids: TextIds | None = None
) -> Route:
    """llama.cpp with the file's own template. text_ids: of a rendered text, by default those of `rebuilt_ids`."""
    special = {key: str(text) for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    template = ChatTemplate("the template in the GGUF file", source, special)
    text_ids = text_ids or rebuilt_ids(vocabulary)

    def ids(messages: Messages, tools: Tools, prompt: bool) -> list[int]:
        return text_ids(template.render(messages, tools=tools, add_generation_prompt=prompt))

    return Route("gguf", ids, text_ids, frozenset(stop_ids(vocabulary)))


def route_of_ollama(
    vocabulary: Vocabulary, template: GoTemplate, stops: list[str], text_ids: TextIds | None = None
) -> Route:
    """Ollama with the Modelfile's template and stop texts. text_ids: as for `route_of_gguf`."""
    text_ids = text_ids or rebuilt_ids(vocabulary)
    own_ends = {at for at, token in enumerate(vocabulary.tokens) if token in stops}

    def ids(messages: Messages, tools: Tools, prompt: bool) -> list[int]:
        if tools:
            raise Refused("our Ollama templates do not support tools")
        return text_ids(template.render(messages, prompt=prompt))

    return Route("ollama", ids, text_ids, frozenset(stop_ids(vocabulary) | own_ends))


def rebuilt_ids(vocabulary: Vocabulary) -> TextIds:
    """The ids that llama.cpp gives a rendered text, by a tokenizer rebuilt from the file's vocabulary.

    A begin token that llama.cpp adds itself is removed from the text first. Raises ModelError for a pre-tokenizer that
    is not known.
    """
    if not vocabulary.scores and vocabulary.pre not in PRE_TOKENIZERS:
        what = f"the token ids of this file cannot be checked: its pre-tokenizer is {vocabulary.pre!r}"
        fix = "pip install llama-cpp-python, then try again: its own tokenizer is used where it is installed"
        raise ModelError(what, where="tokenizer.ggml.pre", fix=fix)
    tokenizer = vocabulary.as_tokenizer()
    begin = [vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else []
    begin_text = vocabulary.tokens[begin[0]] if begin else ""
    return lambda text: begin + tokenizer.encode(text.removeprefix(begin_text), add_special_tokens=False).ids


# --- Ollama's template


_SYSTEM, _USER, _ANSWER, _NEXT_USER = "\ue000Wfgh", "\ue000Kquv", "\ue000Zbmt", "\ue000Rdxy"


@dataclass(frozen=True)
class GoTemplate:
    """A chat template as the texts before each message; None if the template has no such message.

    first_user: before the first user's message without a system text, after_system: with one, next_user: before a later
    one. prompt: at the end of a prompt. end: after the last answer.
    """

    system: str | None
    first_user: str
    after_system: str
    next_user: str | None
    answer: str
    prompt: str
    end: str

    def text(self) -> str:
        """The Go template. Every literal is quoted, so that no white space is trimmed or added."""

        def put(text: str | None) -> str:  # JSON's escapes are Go's where only what must be is escaped
            return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

        system = f'if eq .Role "system" }}}}{put(self.system)}{{{{ .Content }}}}{{{{ else '
        return (
            f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{{{{ {"" if self.system is None else system}'
            f'if eq .Role "user" }}}}'
            f'{{{{ if eq $last "" }}}}{put(self.first_user)}{{{{ else if eq $last "system" }}}}{put(self.after_system)}'
            f"{{{{ else }}}}{put(self.next_user)}{{{{ end }}}}{{{{ .Content }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{put(self.answer)}{{{{ .Content }}}}{{{{ end }}}}'
            f'{{{{ $last = .Role }}}}{{{{ end }}}}{{{{ if eq $last "user" }}}}{put(self.prompt)}{{{{ end }}}}'
        )

    def render(self, messages: Messages, *, prompt: bool) -> str:
        """What Ollama renders; `prompt` false: with the end of the last answer. Raises Refused."""
        text, last = "", ""
        for message in messages:
            role = str(message["role"])
            before = {"system": self.system, "assistant": self.answer}.get(role)
            if role == "user":
                before = {"": self.first_user, "system": self.after_system}.get(last, self.next_user)
            if before is None or (role == "system" and last):
                raise Refused(f"this template has no place for {role} after {last or 'the beginning'} in Ollama")
            text, last = text + before + str(message.get("content") or ""), role
        return text + (self.prompt if last == "user" and prompt else "" if prompt else self.end)


def go_template(template: ChatTemplate, begin: str) -> GoTemplate:
    """The Go form of a template, from renderings of marked messages; parity then proves that nothing is missing.

    begin: the begin token that llama.cpp itself puts first, "" if it puts none. Raises TemplateError if a message
    is missing from its rendering or shown twice.
    """
    system, user, answer, next_user = (
        {"role": role, "content": mark}
        for role, mark in (("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER), ("user", _NEXT_USER))
    )

    def around(*messages: Message, prompt: bool = True) -> list[str]:
        """The texts before, between and after the messages' contents."""
        pieces, rest = [], template.render(list(messages), add_generation_prompt=prompt)
        for message in messages:
            before, mark, rest = rest.partition(message["content"])
            if not mark or message["content"] in rest:
                raise Refused("it does not show every message once")
            pieces.append(before)
        return [*pieces, rest]

    try:
        first_user, prompt = around(user)
        _, between, end = around(user, answer, prompt=False)
    except Refused as refused:
        what = f"{template.name} has no form as an Ollama template: {refused}"
        fix = "--format gguf keeps the template as it is, and llama.cpp's server uses it"
        raise TemplateError(what, where=template.name, fix=fix) from None
    before_system: str | None = None
    before_next_user: str | None = None
    after_system = ""
    with suppress(Refused):
        before_system, after_system, _ = around(system, user)
        before_system = before_system.removeprefix(begin)
    with suppress(Refused):
        before_next_user = around(user, answer, next_user)[2]
    first_user = first_user.removeprefix(begin)
    return GoTemplate(before_system, first_user, after_system, before_next_user, between, prompt, end)
