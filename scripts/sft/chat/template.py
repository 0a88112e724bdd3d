"""Chat templates: which one a run uses, and rendering it in transformers' jinja sandbox under a time limit."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft.config.load import display_path, resolve_path, shipped
from sft.config.schema import Config, DataSection
from sft.errors import TemplateError, nearest, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("sft.chat")
Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
SECONDS = 5.0  # for one render
MAX_CHARACTERS = 20_000_000  # of one rendered text
GENERATION = ("\U000ffff0", "\U000ffff1")  # around {% generation %} blocks in a tracked render
_ANSWER = "\U000ffff2"  # placeholder for the answer where a turn template is rendered up to it
FOLDER, DEFAULT = "chat_templates", "default"
FALLBACK = (
    "{{ bos_token }}{% if system %}System: {{ system }}\n{% endif %}User: {{ user }}\nAssistant: {{ assistant }}\n"
)


class Refused(Exception):
    """The template, or the proof of its labels, refuses one conversation; the text says why."""


class LimitExceeded(jinja2.TemplateError):
    """The template runs too long or writes too much text."""


class _GenerationTag(Extension):
    """`{% generation %}`: writes its block unchanged, between two private characters in a tracked render."""

    tags = {"generation"}  # noqa: RUF012 (jinja's protocol)

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_block"), [], [], body)
        block.set_lineno(line)
        return block

    def _block(self, caller: Macro) -> str:
        tracked = isinstance(self.environment, _Environment) and self.environment.tracked
        return f"{GENERATION[0]}{caller()}{GENERATION[1]}" if tracked else caller()


class _Environment(ImmutableSandboxedEnvironment):
    """jinja as transformers sets it up (utils/chat_template_utils.py); each iteration and call checks the deadline."""

    def __init__(self, day: date) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.lock, self.deadline, self.tracked = threading.Lock(), math.inf, False
        self.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # as in transformers: no HTML escapes
        self.globals.update(raise_exception=_raise, strftime_now=day.strftime)

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise LimitExceeded(f"the template runs for more than {SECONDS:g} seconds")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (jinja's names)
        __self.check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None, lineno=loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(check, lineno=loop.lineno))
            if loop.test is not None:
                loop.test = nodes.And(nodes.Not(check, lineno=loop.lineno), loop.test, lineno=loop.lineno)
        tree.set_environment(self)
        return tree


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def today() -> date:
    """The current day in local time."""
    return date.today()


@dataclass
class ChatTemplate:
    """A compiled template with its variables.

    special: bos_token, eos_token and so on. tool_source: the variant for rows with tools, of models that ship two.
    control_text: what control tokens written inside a message become. day: what `strftime_now` prints, see `fix_date`.
    parts: the template takes contents as [{"type": "text", "text": ...}].
    """

    name: str
    source: str
    special: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    tool_source: str | None = None
    origin: Literal["own", "default", "named"] = "named"
    control_text: Literal["plain", "token"] = "plain"
    day: date = field(default_factory=today)
    parts: bool = False

    def __post_init__(self) -> None:
        self._plain = self._compile(self.source)
        self._with_tools = self._compile(self.tool_source) if self.tool_source else None
        variables = jinja2.meta.find_undeclared_variables(self.syntax())
        self.style: Literal["messages", "turn"] = "messages" if "messages" in variables else "turn"
        if self.style == "turn" and "assistant" not in variables:
            what = "the template never shows the answer: it uses neither `messages` nor `assistant`"
            fix = "loop over `messages`, or write {{ system }}, {{ user }} and {{ assistant }}"
            raise TemplateError(what, where=self.name, fix=fix)

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return _Environment(self.day).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            line = source.splitlines()[error.lineno - 1].strip() if source.splitlines() else ""
            what = f"template syntax: {error.message}"
            fix = "fix that line, or use another template: --set data.template_path=chatml"
            raise TemplateError(what, where=f"{self.name}:{error.lineno}: {line[:120]}", fix=fix) from None
        except (RecursionError, MemoryError, ValueError, jinja2.TemplateError) as error:
            raise TemplateError(f"the template does not compile: {error}", where=self.name) from None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that decides the text: source, options, special tokens, and the date if it is printed."""
        parts = (self.source, self.tool_source, sorted(self.options.items()), sorted(self.special.items()))
        dated = (*parts, self.day.isoformat()) if self.prints_date else parts
        return hashlib.sha256(repr(dated).encode()).hexdigest()

    @property
    def prints_date(self) -> bool:
        """Whether the text depends on the day: the template calls `strftime_now`."""
        return "strftime_now" in self.source or "strftime_now" in (self.tool_source or "")

    def date_macro(self) -> str:
        """A jinja macro `strftime_now` that always prints `day`, to put before the source of an exported template.

        "" if the template prints no date. It knows only the formats that the template writes as constants.
        """
        if not self.prints_date:
            return ""
        formats = re.findall(r"""strftime_now\(\s*['"]([^'"]*)['"]""", f"{self.source} {self.tool_source}")
        table = json.dumps({text: self.day.strftime(text) for text in formats})
        return f"{{% macro strftime_now(format) %}}{{{{ {table}[format] }}}}{{% endmacro %}}"

    def syntax(self) -> nodes.Template:
        """The template's syntax tree."""
        return self._plain.environment.parse(self.source)

    def render(
        self,
        messages: list[Message],
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        tracked: bool = False,
    ) -> str:
        """The text of a conversation, as `apply_chat_template` gives it.

        tracked: put the private characters GENERATION around {% generation %} blocks. Raises Refused if the template
        raises, TemplateError past its limits.
        """
        if self.style == "messages":
            if self.parts:
                messages = [{**message, "content": _as_parts(message.get("content"))} for message in messages]
            variables = {"messages": messages, "tools": tools, "documents": None}
            return self._run({**variables, "add_generation_prompt": add_generation_prompt}, tracked)
        texts = _turn_texts(messages, tools)
        if "assistant" in texts and not add_generation_prompt:
            return self._run({**texts, "add_generation_prompt": False}, tracked)
        text = self._run({**texts, "assistant": _ANSWER, "add_generation_prompt": True}, tracked)
        if _ANSWER not in text:
            raise Refused("the template does not show the answer of this row")
        return text.partition(_ANSWER)[0].rstrip(" ")

    def _run(self, variables: dict[str, Any], tracked: bool) -> str:
        template = self._with_tools if self._with_tools and variables.get("tools") else self._plain
        environment = template.environment
        assert isinstance(environment, _Environment)
        try:
            with environment.lock:
                environment.deadline, environment.tracked = time.monotonic() + SECONDS, tracked
                pieces, size = [], 0
                for piece in template.generate({**self.special, **variables, **self.options}):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_CHARACTERS:
                        raise LimitExceeded(f"the template writes more than {MAX_CHARACTERS:,} characters")
                return "".join(pieces)
        except (LimitExceeded, MemoryError, RecursionError) as error:
            raise TemplateError(str(error) or type(error).__name__, where=f"{self.name}:{_line(error)}") from None
        except jinja2.TemplateError as error:
            raise Refused(f"the template refuses it ({self.name}:{_line(error)}): {error.message}") from None
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise Refused(f"the template fails on it ({self.name}:{_line(error)}): {reason}") from None


def _turn_texts(messages: list[Message], tools: Tools) -> dict[str, str]:
    """The variables system, user and assistant of a conversation of one turn. Raises Refused for any other."""
    roles = [message.get("role") for message in messages]
    turn = roles[1:] if roles[:1] == ["system"] else roles
    if turn not in (["user"], ["user", "assistant"]) or tools:
        shape = "tools" if tools else f"the roles {', '.join(map(str, roles)) or 'none'}"
        raise Refused(f"the template takes one system, user and assistant text; this row has {shape}")
    texts = {"system": ""}
    for message in messages:
        content = message.get("content")
        texts[str(message["role"])] = content if isinstance(content, str) else ""
    return texts


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _line(error: BaseException) -> str:
    """The line of the template that an error comes from, as jinja puts it into the traceback; `?` if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((str(frame.lineno) for frame in reversed(frames) if frame.filename == "<template>"), "?")


def fix_date(config: Config, resumed: Config | None = None) -> Config:
    """The config of a run with `data.template_date: auto` resolved to a day: that of `resumed`, the config of the
    checkpoint to resume from, else today. Stored with the run, it makes every command render the tokens trained on.
    """
    if config.data.template_date != "auto":
        return config
    dates = [resumed.data.template_date] if resumed else []
    day = next((day for day in dates if day != "auto"), today().isoformat())
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": day})})


def load_template(data: DataSection, tokenizer: PreTrainedTokenizerBase, root: Path) -> ChatTemplate:
    """The template that `data.template_path` means; see docs/TEMPLATES.md. Paths count from `root`.

    Raises TemplateError for a missing file, a syntax error (with its line), or a template that shows no answer.
    """
    name, own, bos = data.template_path, tokenizer.chat_template, tokenizer.bos_token
    common: dict[str, Any] = {
        "special": {key: str(text) for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)},
        "options": dict(data.template_options),
        "control_text": data.control_text,
        "day": today() if data.template_date == "auto" else date.fromisoformat(data.template_date),
    }
    if name == "auto" and own:
        shown = f"the chat template of {Path(str(tokenizer.name_or_path)).name or tokenizer.name_or_path}"
        variants: dict[str, str] = own if isinstance(own, dict) else {"default": own}
        source = variants.get("default") or next(iter(variants.values()))
        return ChatTemplate(shown, source, tool_source=variants.get("tool_use"), origin="own", **common)
    common["origin"] = "default" if name == "auto" else "named"
    path = _template_file(DEFAULT if name == "auto" else name, root)
    if name == "auto" and not path.is_file():
        log.warning(
            f"the model has no chat template and {FOLDER}/{DEFAULT}.jinja is missing: rows are written as"
            " `System: / User: / Assistant:`"
        )
        return ChatTemplate("plain fallback", FALLBACK, **common)
    shown = display_path(path, root)
    try:
        source = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = template_names(root)
        near = nearest(Path(name).stem, known, cutoff=0.5)
        guess = f"did you mean {near}? " if near else ""
        what = f"the chat template {name!r} does not exist"
        fix = f"{guess}names: {', '.join(known)}; or a file that ends in .jinja"
        raise TemplateError(what, where=f"data.template_path, looked for {shown}", fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}", where=shown) from None
    template = ChatTemplate(shown, source, **common)
    writes_bos = not bos or bos in source or "bos_token" in source
    if writes_bos or tokenizer.encode("x", add_special_tokens=True)[:1] != [tokenizer.bos_token_id]:
        return template
    if template.style == "turn":
        return ChatTemplate(shown, "{{ bos_token }}" + source, **common)
    log.warning(
        f"this model's texts begin with {bos}, but {shown} does not write it: start the template with"
        " {{ bos_token }}, unless its absence is intended"
    )
    return template


def template_names(root: Path) -> list[str]:
    """The templates that can be named, sorted."""
    folders = {resolve_path(root, FOLDER), shipped(root, f"{FOLDER}/{DEFAULT}.jinja").parent}
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.jinja")})


def _template_file(name: str, root: Path) -> Path:
    if "/" not in name and "." not in name:
        shipped_file = shipped(root, f"{FOLDER}/{name}.jinja")
        if shipped_file.is_file() or not resolve_path(root, name).is_file():
            return shipped_file
    return shipped(root, name)
