"""The schema as a flat table (every dotted key with what it takes, its default, its meaning), and docs/CONFIG.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from sft.config.schema import Config

WORDS = {
    "boolean": "`true` or `false`", "string": "text", "null": "null", "integer": "a whole number", "number": "a number",
    "object": "a mapping",
}  # fmt: skip
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Field:
    """One key of the schema; of an entry of a list of mappings, `data.sources[].path`.

    section: whether the key is a mapping of other keys. text: it takes text, or a list of texts, and no number, so that
    `2024` or `007` is read as written.
    """

    key: str
    expected: str
    default: Any
    description: str
    section: bool
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
    schema = Config.model_json_schema()
    return {field.key: field for field in _walk(schema, "", schema["$defs"])}


def _walk(section: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> Iterator[Field]:
    """The keys of one section of the JSON schema, and of the sections in it."""
    for name, entry in section["properties"].items():
        members = entry.get("anyOf", [entry])
        items = [member.get("items", {}) for member in members]
        inner = next((definitions[each["$ref"].split("/")[-1]] for each in members + items if "$ref" in each), None)
        is_section = any("$ref" in member for member in members)
        yield Field(
            key=prefix + name,
            expected=" or ".join(map(_expected, members)),
            default=None if is_section else entry.get("default", "(required)"),
            description=entry.get("description") or (inner or {})["description"],
            section=is_section,
            nullable={"type": "null"} in members,
            text=any(each.get("type") == "string" and not _choices(each) for each in members + items)
            and not any(member.get("type") in ("integer", "number") for member in members),
            choices=tuple(str(choice) for each in members + items for choice in _choices(each)),
        )
        if inner:
            yield from _walk(inner, f"{prefix}{name}." if is_section else f"{prefix}{name}[].", definitions)


def _choices(member: dict[str, Any]) -> list[Any]:
    return member.get("enum") or ([member["const"]] if "const" in member else [])


def _expected(member: dict[str, Any]) -> str:
    """What one member of a type takes, in words."""
    if choices := [f"`{choice}`" for choice in _choices(member)]:
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if "$ref" in member:
        return "a mapping of keys"
    if member["type"] == "array":
        choices = [f"`{choice}`" for choice in _choices(member["items"])]
        kinds = {"string": "texts", "integer": "whole numbers"}
        return f"a list of {', '.join(choices) or kinds.get(member['items'].get('type'), 'mappings')}"
    limits = [f"{word} {member[limit]:g}" for limit, word in LIMITS.items() if limit in member]
    limits += ["not empty"] if "minLength" in member else []
    return WORDS[member["type"]] + (f" ({', '.join(limits)})" if limits else "")


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
        lines.append(f"## `{section.key}`\n\n{section.description}\n\n| key | takes | default | meaning |")
        lines.append("|---|---|---|---|")
        for field in fields:
            if field.key.startswith(section.key + ".") and (not field.section or field.nullable):
                cells = (f"`{field.key}`", field.expected, f"`{field.shown_default}`", field.description)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
