"""What one render of a template may still spend: time, text, and the size of what it builds."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from sft.config.load import display_path, resolve_path, shipped
from sft.config.schema import Config, DataSection
from sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SECONDS = 5.0
MOST_TEXT = 100_000_000  # characters that one render may make on the way, all pieces counted
MOST_OUTPUT = 20_000_000  # characters of one text
MOST_NUMBER = 1_000_000  # largest number that a filter or a method takes
ITEM = 16  # characters that one item of a list costs
_WIDE = re.compile(r"\d{6,}|%[-+ #0]*\*|%[^%a-zA-Z]*\.\*")


class OutOfBounds(jinja2.TemplateError):
    """The template takes too long or makes too much text."""


class Purse:
    """What one render may still spend."""

    def __init__(self) -> None:
        self.until = time.monotonic() + SECONDS
        self.text = MOST_TEXT
        self._weights: dict[int, tuple[Any, int]] = {}  # by identity; the value is held, so that it stays the same

    def tick(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfBounds(f"the template runs for more than {SECONDS:g} seconds")

    def spend(self, size: int) -> None:
        self.text -= size
        if size > MOST_OUTPUT or self.text < 0:
            most = MOST_OUTPUT if size > MOST_OUTPUT else MOST_TEXT
            raise OutOfBounds(f"the template makes more than {most:,} characters of text")

    def weighed(self, value: Any) -> Any:
        """The value, if it is small when written out in full: `[x, x]` holds x twice, and 40 levels of it no memory.

        Whatever walks through a value (text, JSON, `==`, sorting) takes as long as it is large. Sandboxed templates
        cannot change a list or mapping, so what one weighs is reckoned once.
        """
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            self._weight(value)
        return value

    def _weight(self, value: Any) -> int:
        if isinstance(value, (str, bytes)):
            return ITEM + len(value)
        if isinstance(value, int):
            return ITEM + value.bit_length() // 3
        if not isinstance(value, (list, tuple, dict, set, frozenset)):
            return ITEM
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        self.tick()
        weight = ITEM + sum(map(self._weight, value))
        if isinstance(value, dict):
            weight += sum(map(self._weight, value.values()))
        if weight > MOST_OUTPUT:
            raise OutOfBounds(f"the template builds a value that is more than {MOST_OUTPUT:,} characters when written")
        self._weights[id(value)] = value, weight
        return weight


def check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if type(value) is int and not -MOST_NUMBER <= value <= MOST_NUMBER:
            raise OutOfBounds(f"the template gives the number {value:.3e} to a filter or method")


def check_format(text: str | bytes) -> None:
    if _WIDE.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise OutOfBounds("the template formats to a very large width")


def product(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits that a product or power will have."""
    for sized, number in ((left, right), (right, left)):
        if isinstance(sized, (str, bytes, list, tuple)):
            each = 1 if isinstance(sized, (str, bytes)) else ITEM
            return each * len(sized) * number if isinstance(number, int) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_NUMBER:
            raise OutOfBounds("the template computes a very large number")
    return 0


def replaced(text: Any, old: Any, new: Any) -> int:
    if not isinstance(old, (str, bytes)) or not isinstance(new, (str, bytes)):
        return 0
    times = text.count(old) if old else len(text) + 1
    return len(text) + int(times) * len(new)


GENERATION = ("\U000ffff0", "\U000ffff1")  # written around {% generation %} blocks when a render tracks them
_GROWING_METHODS = frozenset({"translate", "maketrans", "expandtabs"})
_SLOW_ON_TEXT = frozenset({"title", "wordcount", "urlize", "striptags", "xmlattr"})
_BY_CHARACTER = frozenset(
    "list sort batch slice unique groupby map select reject selectattr rejectattr min max sum random pprint".split()
)


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (jinja's name)
        self.write("environment.paid_concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:  # noqa: N802
        self.write(f" {operators[node.op]} environment.weighed(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("{")
        for item in node.items:
            self.write("environment.weighed(")
            self.visit(item.key, frame)
            self.write("): ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")


class GenerationTag(Extension):
    """`{% generation %}`: the block stands as it is; where a render tracks, two private characters stand around it."""

    tags = {"generation"}  # noqa: RUF012 (jinja's protocol)

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_block"), [], [], body)
        block.set_lineno(line)
        return block

    def _block(self, caller: Macro) -> str:
        text = caller()
        environment = self.environment
        tracks = isinstance(environment, ChatEnvironment) and environment.tracks
        return f"{GENERATION[0]}{text}{GENERATION[1]}" if tracks else text


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; `bounded()` holds it for one render."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, day: date) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], finalize=self.weighed
        )
        self.purse = Purse()
        self.tracks = False
        self._lock = threading.RLock()
        self.globals.pop("lipsum", None)
        self.globals.update(raise_exception=_raise, strftime_now=day.strftime)
        self.filters["tojson"] = _tojson
        self.filters = {name: self._watched(name, made) for name, made in self.filters.items()}
        self.tests = {name: self._watched(name, made) for name, made in self.tests.items()}

    @contextmanager
    def bounded(self, *, tracks: bool = False) -> Iterator[None]:
        """A fresh purse for the block; other threads wait."""
        with self._lock:
            self.purse, self.tracks = Purse(), tracks
            try:
                yield
            finally:
                self.tracks = False

    def tick(self) -> bool:
        self.purse.tick()
        return True

    def weighed(self, value: Any) -> Any:
        return self.purse.weighed(value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.weighed(argument))

    def paid_concat(self, parts: tuple[object, ...]) -> str:
        texts = [str(self.weighed(part)) for part in parts]
        self.purse.spend(sum(map(len, texts)))
        return "".join(texts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(call, lineno=loop.lineno))
            if loop.test is not None:
                loop.test = nodes.And(call, loop.test, lineno=loop.lineno)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        purse = self.purse
        if operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                purse.spend((len(left) + len(right)) * (1 if isinstance(left, str) else 8))
            return left + right
        if operator == "%" and isinstance(left, str):
            check_format(left)
        if operator == "%":
            self.weighed(right)
        elif operator in ("*", "**"):
            purse.spend(product(operator, left, right))
        made = super().call_binop(context, operator, left, right)
        if operator == "%" and isinstance(made, str):
            purse.spend(len(made))
        return made

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (jinja's names)
        __self.purse.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            args = __self._paid(getattr(__obj, "__name__", ""), owner, args)
        if __obj is not safe_range:
            check_numbers(args, kwargs)
        for value in (*args, *kwargs.values()):
            __self.weighed(value)
        made = super().call(__context, __obj, *args, **kwargs)
        __self._pay_result(made)
        return made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(value.__self__, str):
            check_format(value.__self__)
        return super().wrap_str_format(value)

    def _pay_result(self, made: object) -> None:
        if isinstance(made, str):
            self.purse.spend(len(made))
        elif isinstance(made, list):
            self.purse.spend(4 * ITEM * len(made))

    def _paid_items(self, made: Iterator[Any]) -> Iterator[Any]:
        """What `batch`, `map` and their like yield, each item paid for with the bytes that it takes at least."""
        for item in made:
            self.purse.tick()
            self.purse.spend(64)
            yield item

    def _paid(self, name: str, owner: str | bytes, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pays for a text method before it runs; a generator given to `join` is taken as a list."""
        if name in _GROWING_METHODS:
            raise OutOfBounds(f"the template calls str.{name}, which sft-play does not run")
        if name == "join" and args:
            parts = list(args[0])
            self.purse.spend(sum(len(part) + len(owner) for part in parts if isinstance(part, (str, bytes))))
            return (parts, *args[1:])
        if name == "replace" and len(args) > 1:
            self.purse.spend(replaced(owner, args[0], args[1]))
        return args

    def _watched(self, name: str, made: Any) -> Callable[..., Any]:
        """A filter or test that ticks, takes no large number, and pays for what it makes."""
        skipped = 1 if hasattr(made, "jinja_pass_arg") else 0

        @functools.wraps(made)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.purse.tick()
            given = args[skipped:]
            if name not in ("default", "d"):
                check_numbers(given[1:], kwargs)
            for value in (*given, *kwargs.values()):
                self.purse.weighed(value)
            if given and isinstance(given[0], str) and (name in _SLOW_ON_TEXT or name in _BY_CHARACTER):
                self.purse.spend(ITEM * len(given[0]))
            if name in ("replace", "wordwrap", "indent", "urlize", "xmlattr"):
                size = len(given[0]) if hasattr(given[0], "__len__") else 1
                more = (*given[1:], *kwargs.values())
                rest = [len(x) if isinstance(x, str) else x if isinstance(x, int) else 1 for x in more]
                self.purse.spend(size * max([1, *rest]))
            elif name == "sum":
                parts = list(given[0])
                numbers = all(isinstance(part, (int, float)) for part in parts)
                self.purse.spend(ITEM * len(parts) if numbers else len(parts) ** 2)  # lists are copied again and again
                args = (*args[:skipped], parts, *given[1:])
            elif name == "format":
                check_format(str(given[0]))
            elif name == "join":
                parts = list(given[0])
                glue = given[1] if len(given) > 1 else kwargs.get("d", "")
                self.purse.spend(sum(len(str(part)) + len(str(glue)) for part in parts))
                args = (*args[:skipped], parts, *given[1:])
            result = made(*args, **kwargs)
            self._pay_result(result)
            return self._paid_items(result) if isinstance(result, GeneratorType) else result

        return watched


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if isinstance(indent, int) and indent > 64:
        raise OutOfBounds("the template indents JSON by more than 64")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


Message = dict[str, Any]
LARGEST_SOURCE = 1_000_000
_ANSWER = "\U000ffff2"  # stands for the answer where a turn template is rendered up to it


class Refused(Exception):
    """The template, or the proof of its labels, refuses one conversation; the text says why."""


def today() -> date:
    """The current day in local time."""
    return date.today()


@dataclass
class ChatTemplate:
    """A compiled template with its variables.

    name: for messages. source: the text. special: bos_token, eos_token and so on. options: `data.template_options`.
    tool_source: the variant used where a row has tools, for models that ship two. origin: it came with the model, is
    what is taken where none did, or was named in the config.
    control_text: what control tokens written inside a message become, plain text or the tokens.
    day: what `strftime_now` prints, at midnight; see `fix_date`.
    """

    name: str
    source: str
    special: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    tool_source: str | None = None
    origin: Literal["own", "default", "named"] = "named"
    path: Path | None = None
    control_text: Literal["plain", "token"] = "plain"
    day: date = field(default_factory=today)
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
                fix="loop over `messages`, or write {{ system }}, {{ user }} and {{ assistant }}",
            )

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

        "" where the template prints no date. Only the formats that the template writes out are known to it.
        """
        if not self.prints_date:
            return ""
        environment = self._plain.environment
        calls = [
            call
            for source in (self.source, self.tool_source or "")
            for call in environment.parse(source).find_all(nodes.Call)
            if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now" and len(call.args) == 1
        ]
        formats = [call.args[0].value for call in calls if isinstance(call.args[0], nodes.Const)]
        table = json.dumps({text: self.day.strftime(text) for text in formats})
        return f"{{% macro strftime_now(format) %}}{{{{ {table}[format] }}}}{{% endmacro %}}"

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
            return ChatEnvironment(self.day).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            shown = source.splitlines()[error.lineno - 1].strip() if source.splitlines() else ""
            raise TemplateError(
                f"template syntax: {error.message}",
                where=f"{self.name}:{error.lineno}: {shown[:120]}",
                fix="fix that line, or take another template: --set data.template_path=chatml",
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


log = logging.getLogger("sft.chat")


def fix_date(config: Config, resumed: Config | None = None) -> Config:
    """The config of a run that begins, or of one that is resumed, with `data.template_date: auto` resolved to a day.

    resumed: the resolved config of the checkpoint to resume from; its day is used again. Stored with the run, the day
    makes resume, eval, infer and export render the tokens that the run was trained on. A date in the config wins.
    """
    if config.data.template_date != "auto":
        return config
    day = resumed.data.template_date if resumed else "auto"
    day = today().isoformat() if day == "auto" else day
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": day})})


FOLDER = "chat_templates"
DEFAULT = "default"
FALLBACK = (
    "{{ bos_token }}{% if system %}System: {{ system }}\n{% endif %}User: {{ user }}\nAssistant: {{ assistant }}\n"
)


def load_template(data: DataSection, tokenizer: PreTrainedTokenizerBase, root: Path) -> ChatTemplate:
    """The template that `data.template_path` means; see docs/TEMPLATES.md. Paths count from `root`.

    Raises TemplateError for a missing file, a syntax error (with its line), or a template that shows no answer.
    """
    asked = data.template_path
    common: dict[str, Any] = {
        "special": {key: str(text) for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)},
        "options": dict(data.template_options),
        "control_text": data.control_text,
        "day": today() if data.template_date == "auto" else date.fromisoformat(data.template_date),
    }
    if asked == "auto" and (own := tokenizer.chat_template):
        return _own(own, str(tokenizer.name_or_path), common)
    path = _path(DEFAULT if asked == "auto" else asked, root)
    if asked == "auto" and not path.is_file():
        log.warning(
            f"the model has no chat template and {FOLDER}/{DEFAULT}.jinja is missing: rows are written as"
            " `System: / User: / Assistant:`"
        )
        return ChatTemplate("plain fallback", FALLBACK, origin="default", **common)
    if not path.is_file():
        raise _missing(asked, path, root)
    name = display_path(path, root)
    origin: Literal["default", "named"] = "default" if asked == "auto" else "named"
    return _with_begin(ChatTemplate(name, _read(path, name), path=path, origin=origin, **common), tokenizer, common)


def names(root: Path) -> list[str]:
    """The templates that can be named, sorted."""
    folders = {resolve_path(root, FOLDER), shipped(root, f"{FOLDER}/{DEFAULT}.jinja").parent}
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.jinja")})


def _own(own: Any, model: str, common: dict[str, Any]) -> ChatTemplate:
    name = f"the chat template of {Path(model).name or model}"
    if isinstance(own, str):
        return ChatTemplate(name, own, origin="own", **common)
    first = own.get("default") or next(iter(own.values()))
    return ChatTemplate(name, first, tool_source=own.get("tool_use"), origin="own", **common)


def _path(asked: str, root: Path) -> Path:
    if "/" not in asked and "." not in asked:
        named = shipped(root, f"{FOLDER}/{asked}.jinja")
        if named.is_file() or not resolve_path(root, asked).is_file():
            return named
    return shipped(root, asked)


def _missing(asked: str, path: Path, root: Path) -> TemplateError:
    known = names(root)
    near = difflib.get_close_matches(Path(asked).stem, known, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}? " if near else ""
    return TemplateError(
        f"the chat template {asked!r} is not there",
        where=f"data.template_path, looked for {display_path(path, root)}",
        fix=f"{fix}names: {', '.join(known)}; or a file that ends in .jinja",
    )


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}", where=name) from None


def _with_begin(made: ChatTemplate, tokenizer: PreTrainedTokenizerBase, common: dict[str, Any]) -> ChatTemplate:
    """Sees to the begin token, where the tokenizer puts one before every text: templates must write it themselves."""
    begin = tokenizer.bos_token
    if not begin or begin in made.source or "bos_token" in made.source:
        return made
    if tokenizer.encode("x", add_special_tokens=True)[:1] != [tokenizer.bos_token_id]:
        return made
    if made.style == "turn":
        source = "{{ bos_token }}" + made.source
        return ChatTemplate(made.name, source, path=made.path, origin=made.origin, **common)
    log.warning(
        f"this model's texts begin with {begin}, and {made.name} does not write it: put {{{{ bos_token }}}} first in"
        " it, unless you mean to leave it out"
    )
    return made
