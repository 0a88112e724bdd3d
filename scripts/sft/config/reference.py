"""The schema as a flat table (every dotted key with what it takes, its default, its meaning), and docs/CONFIG.md."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from sft.config.schema import Config, Section


@dataclass(frozen=True)
class Field:
    """One key of the schema.

    section: its class, when the key is a mapping of other keys. text: it takes text, or a list of texts, and no number,
    so that `2024` or `007` is read as written.
    """

    key: str
    expected: str
    default: Any
    description: str
    section: type[Section] | None
    nullable: bool
    text: bool
    choices: tuple[str, ...]

    @property
    def shown_default(self) -> str:
        """The default as YAML."""
        if isinstance(self.default, bool) or self.default is None:
            return {True: "true", False: "false", None: "null"}[self.default]
        return '""' if self.default == "" else str(self.default).replace("'", "")


@cache
def table() -> dict[str, Field]:
    """Every key, sections included, in the order of the schema."""
    return {field.key: field for field in _walk(Config, "")}


def _walk(section: type[Section], prefix: str) -> Iterator[Field]:
    for name, info in section.model_fields.items():
        field = _field(prefix + name, info)
        yield field
        if field.section:
            yield from _walk(field.section, field.key + ".")


def _field(key: str, info: FieldInfo) -> Field:
    members = list(_members(info.annotation, info.metadata))
    kinds = [kind for kind, _ in members]
    section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    default = "(required)" if info.is_required() else info.get_default(call_default_factory=True)  # type: ignore[call-arg]
    return Field(
        key=key,
        expected=" or ".join(_expected(kind, limits) for kind, limits in members),
        default=None if section else default,
        description=info.description or (section.__doc__ if section else None) or "",
        section=section,
        nullable=type(None) in kinds,
        text=(str in kinds or list[str] in kinds) and not {int, float} & set(kinds),
        choices=tuple(str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)),
    )


def _members(annotation: Any, limits: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """The members of a union, each with its limits."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member, limits)
    elif get_origin(annotation) is Annotated:
        kind, *own = get_args(annotation)
        yield kind, [*own, *limits]
    else:
        yield annotation, limits


def _expected(kind: Any, limits: list[Any]) -> str:
    """What one member of a type takes, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        choices = ", ".join(f"`{choice}`" for choice in arguments)
        return choices if len(arguments) == 1 else f"one of {choices}"
    if origin is list and get_origin(arguments[0]) is Literal:
        return f"a list of {', '.join(f'`{choice}`' for choice in get_args(arguments[0]))}"
    if origin is list and arguments[0] is not str:
        return "a list of mappings"
    if origin is None and issubclass(kind, Section):
        return "a mapping of keys"
    words = {
        bool: "`true` or `false`", str: "text", type(None): "null", int: "a whole number", float: "a number",
        list: "a list of texts", dict: "a mapping",
    }[origin or kind]  # fmt: skip
    limit_words = [text for limit in limits for text in _limit(limit, kind)]
    return f"{words} ({', '.join(limit_words)})" if limit_words else words


def _limit(limit: Any, kind: Any) -> Iterator[str]:
    if kind is str and isinstance(limit, MinLen):
        yield "not empty"
    for family, name, word in ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below")):
        if kind in (int, float) and isinstance(limit, family):
            yield f"{word} {getattr(limit, name)}"


HEAD = """# Every key of a configuration

Written from the schema by `python scripts/config_reference.py`; change the descriptions there, not here.

A configuration is YAML. `include:` (one path or a list, looked for beside the file, then at the project root) comes
first, then the file, then every `--set key=value`; mappings merge, lists replace whole. Paths count from the project
root. `true` and `false` are the only booleans, `2e-4` and `1e5` are numbers, `NO`, `on` and `2026-11-21` are text.
`auto` is resolved when a run starts: the value and its reason are printed, and the value is stored in the run's
`config.resolved.yaml`. A value that is not `auto` is never changed. An unknown key, a wrong type or a key given twice
stops the command before anything else, and every mistake is named with its line.
"""


def markdown() -> str:
    """The text of docs/CONFIG.md."""
    lines, fields = [HEAD], list(table().values())
    for section in (field for field in fields if field.section and "." not in field.key):
        lines += [
            f"## `{section.key}`\n\n{section.description}\n",
            "| key | takes | default | meaning |\n|---|---|---|---|",
        ]
        for field in fields:
            if field.key.startswith(section.key + ".") and (not field.section or field.nullable):
                default = "null" if field.section else field.shown_default
                cells = (f"`{field.key}`", field.expected, f"`{default}`", field.description)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
