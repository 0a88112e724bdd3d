"""Where chat templates run: the environment of transformers' `apply_chat_template`, with a bound on time and memory.

A template comes with a model from anywhere, so it is not trusted. Jinja's immutable sandbox keeps it from Python's
insides; what it leaves open is `'a' * 10**9`, `x|center(10**9)` and nested loops. So every loop turn, call, filter and
test looks at the clock, every text that is made is paid for from one purse, and no number given to them is large, nor a
value that they walk through (`purse.py`).
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from sft.chat.purse import ITEM, OutOfBounds, Purse, check_format, check_numbers, product, replaced

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

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], finalize=self.weighed
        )
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
