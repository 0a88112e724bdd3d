"""The schema as a flat table: every dotted key with what it takes, its default and its meaning, in plain words."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from sft.config.schema import Config, Section


@dataclass(frozen=True)
class Field:
    """One key of the schema.

    section: the keys below it, when it is a mapping of its own. text: it takes text and no number, so that `2024` or
    `007` is taken as written; texts: the same for the items of its list. aliases: other accepted spellings.
    """

    key: str
    expected: str
    default: Any
    description: str
    section: type[Section] | None
    nullable: bool
    text: bool
    texts: bool
    choices: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def shown_default(self) -> str:
        """The default as it would stand in a file."""
        if isinstance(self.default, bool) or self.default is None:
            return {True: "true", False: "false", None: "null"}[self.default]
        return '""' if self.default == "" else str(self.default).replace("'", "")


@cache
def table() -> dict[str, Field]:
    """Every key, sections included, in the order of the schema."""
    return {field.key: field for field in _walk(Config, "")}


def aliases() -> dict[str, str]:
    """Other accepted spellings (dotted) and the key that each stands for."""
    return {alias: field.key for field in table().values() for alias in field.aliases}


def _walk(section: type[Section], prefix: str) -> Iterator[Field]:
    for name, info in section.model_fields.items():
        field = _field(prefix + name, info)
        yield field
        if field.section:
            yield from _walk(field.section, field.key + ".")


def _field(key: str, info: FieldInfo) -> Field:
    parts = list(_parts(info.annotation))
    kinds = [kind for kind, _ in parts]
    section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    choices = tuple(str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind))
    spelled = info.validation_alias.choices if isinstance(info.validation_alias, AliasChoices) else []
    prefix, _, name = key.rpartition(".")
    return Field(
        key=key,
        expected=" or ".join(_words(kind, [*info.metadata, *limits]) for kind, limits in parts),
        default=None if section else _default(info),
        description=info.description or "",
        section=section,
        nullable=type(None) in kinds,
        text=str in kinds and not {int, float} & set(kinds),
        texts=list[str] in kinds,
        choices=choices,
        aliases=tuple(f"{prefix}.{other}" for other in spelled if isinstance(other, str) and other != name),
    )


def _default(info: FieldInfo) -> Any:
    return "(must be given)" if info.is_required() else info.get_default(call_default_factory=True)  # type: ignore[call-arg]


def _parts(annotation: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The members of a union, each with the limits that it carries itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _parts(member)
    elif get_origin(annotation) is Annotated:
        kind, *limits = get_args(annotation)
        yield kind, limits
    else:
        yield annotation, []


def _words(kind: Any, limits: list[Any]) -> str:
    if get_origin(kind) is Literal:
        choices = [f"`{choice}`" for choice in get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(limits)
    if isinstance(kind, type) and not get_origin(kind) and issubclass(kind, Section):
        return "a mapping of keys"
    if get_origin(kind) is dict:
        return "a mapping"
    if get_origin(kind) is list and kind != list[str]:
        (item,) = get_args(kind)
        if get_origin(item) is Literal:
            return f"a list of {', '.join(f'`{choice}`' for choice in get_args(item))}"
        return "a list of mappings"
    if kind is str and any(isinstance(limit, MinLen) for limit in limits):
        return "text (not empty)"
    return {bool: "`true` or `false`", str: "text", type(None): "null", list[str]: "a list of texts"}[kind]


def _range(limits: list[Any]) -> str:
    words = []
    for limit in limits:
        if isinstance(limit, Ge):
            words.append(f"at least {limit.ge}")
        elif isinstance(limit, Gt):
            words.append(f"above {limit.gt}")
        elif isinstance(limit, Le):
            words.append(f"at most {limit.le}")
        elif isinstance(limit, Lt):
            words.append(f"below {limit.lt}")
    return f" ({', '.join(words)})" if words else ""


HEAD = """# Every key of a configuration

Written from the schema by `python scripts/config_reference.py`; change the descriptions there, not here.

A configuration is YAML. `include:` (one path or a list, looked for beside the file, then at the project root) comes
first, then the file, then every `--set key=value`; mappings merge, lists replace whole. Paths count from the project
root. `true` and `false` are the only booleans, `2e-4` and `1e5` are numbers, `NO`, `on` and `2026-11-21` are text.
`auto` is settled when a run starts: the value and its reason are printed, and the value is kept in the run's
`config.resolved.yaml`. An unknown key, a wrong type or a key written twice stops the command before anything else,
with every mistake named by its line.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_sections()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    fields = list(table().values())
    for section in (field for field in fields if field.section and "." not in field.key):
        yield f"## `{section.key}`\n\n{section.description}\n"
        yield "| key | takes | default | meaning |\n|---|---|---|---|"
        for field in fields:
            if field.key.startswith(section.key + ".") and (not field.section or field.nullable):
                yield _row(field)
        yield ""


def _row(field: Field) -> str:
    default = "null" if field.section else field.shown_default
    cells = [f"`{field.key}`", field.expected, f"`{default}`", field.description]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
