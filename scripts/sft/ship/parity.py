"""The parity certificate: every exported form gives the ids of training, and stops where the answers of training end.

A row is rendered and tokenised as training does it and as each exported form is used; the first token that differs
refuses the export. Rows that only some forms can hold (control tokens as plain words, roles that the template refuses)
are set aside and named.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.chat.encode import Encoder
from sft.chat.template import Refused
from sft.data import records
from sft.errors import TemplateError

log = logging.getLogger("sft.ship")
PARITY = "parity.json"
Row = dict[str, Any]
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
        mend="mend the exported template or tokenizer; nothing was exported. docs/SHIPPING.md tells the usual causes",
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
        mend="put the token into generation_config.json (eos_token_id); nothing was exported",
    )
