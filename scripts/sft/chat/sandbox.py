"""Where chat templates run: the environment of transformers' `apply_chat_template`, with a bound on time and memory.

A template comes with a model from anywhere, so it is not trusted. Jinja's immutable sandbox keeps it from Python's
insides; what it leaves open is `'a' * 10**9`, `x|center(10**9)` and nested loops. So every loop turn, call, filter and
test looks at the clock, every text that is made is paid for from one purse, and no number given to them is large.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

SECONDS = 10.0
MOST_TEXT = 100_000_000  # characters that one render may make on the way, all pieces counted
MOST_OUTPUT = 20_000_000  # characters of one text
MOST_NUMBER = 1_000_000  # largest number that a filter or a method takes
GENERATION = ("\U000ffff0", "\U000ffff1")  # written around {% generation %} blocks when a render tracks them
_WIDE = re.compile(r"\d{6,}|%[-+ #0]*\*|%[^%a-zA-Z]*\.\*")
_GROWING_METHODS = frozenset({"translate", "maketrans", "expandtabs"})


class OutOfBounds(jinja2.TemplateError):
    """The template takes too long or makes too much text."""


class Purse:
    """What one render may still spend."""

    def __init__(self) -> None:
        self.until = time.monotonic() + SECONDS
        self.text = MOST_TEXT

    def tick(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfBounds(f"the template runs for more than {SECONDS:g} seconds")

    def spend(self, size: int) -> None:
        self.text -= size
        if size > MOST_OUTPUT or self.text < 0:
            most = MOST_OUTPUT if size > MOST_OUTPUT else MOST_TEXT
            raise OutOfBounds(f"the template makes more than {most:,} characters of text")


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (jinja's name)
        self.write("environment.paid_concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


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

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.purse = Purse()
        self.tracks = False
        self._lock = threading.RLock()
        self._now = datetime.now()
        self.globals.pop("lipsum", None)
        self.globals.update(raise_exception=_raise, strftime_now=self._now.strftime)
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

    def paid_concat(self, parts: tuple[object, ...]) -> str:
        texts = [str(part) for part in parts]
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
                purse.spend(len(left) + len(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator in ("*", "**"):
            purse.spend(_product(operator, left, right))
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
            _check_numbers(args, kwargs)
        made = super().call(__context, __obj, *args, **kwargs)
        __self._pay_result(made)
        return made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(value.__self__, str):
            _check_format(value.__self__)
        return super().wrap_str_format(value)

    def _pay_result(self, made: object) -> None:
        if isinstance(made, str):
            self.purse.spend(len(made))
        elif isinstance(made, list):
            self.purse.spend(8 * len(made))

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
            self.purse.spend(_replaced(owner, args[0], args[1]))
        return args

    def _watched(self, name: str, made: Any) -> Callable[..., Any]:
        """A filter or test that ticks, takes no large number, and pays for what it makes."""
        skipped = 1 if hasattr(made, "jinja_pass_arg") else 0

        @functools.wraps(made)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.purse.tick()
            given = args[skipped:]
            if name not in ("default", "d"):
                _check_numbers(given[1:], kwargs)
            if name in ("replace", "wordwrap", "indent", "urlize", "xmlattr"):
                size = len(given[0]) if hasattr(given[0], "__len__") else 1
                rest = [len(x) if isinstance(x, str) else x if isinstance(x, int) else 1 for x in given[1:]]
                rest += [len(x) if isinstance(x, str) else x if isinstance(x, int) else 1 for x in kwargs.values()]
                self.purse.spend(size * max([1, *rest]))
            elif name == "format":
                _check_format(str(given[0]))
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


def _check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if type(value) is int and not -MOST_NUMBER <= value <= MOST_NUMBER:
            raise OutOfBounds(f"the template gives the number {value:.3e} to a filter or method")


def _check_format(text: str | bytes) -> None:
    if _WIDE.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise OutOfBounds("the template formats to a very large width")


def _product(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits that a product or power will have."""
    for sized, number in ((left, right), (right, left)):
        if isinstance(sized, (str, bytes, list, tuple)):
            return len(sized) * number if isinstance(number, int) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_NUMBER:
            raise OutOfBounds("the template computes a very large number")
    return 0


def _replaced(text: Any, old: Any, new: Any) -> int:
    if not isinstance(old, (str, bytes)) or not isinstance(new, (str, bytes)):
        return 0
    times = text.count(old) if old else len(text) + 1
    return len(text) + int(times) * len(new)
