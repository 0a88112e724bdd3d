"""docs/CONFIG.md: one row for every key, written from the schema."""

from __future__ import annotations

from collections.abc import Iterator

from sft.config.fields import Field, table

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
