"""Answers that must be JSON: do they parse, do they satisfy a schema, are their fields right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.errors import ConfigError

_BROKEN = object()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def parse(text: str) -> Any:
    """The JSON value that the whole text is, or a marker for which `broken` is true.

    Stricter than Python's reader: NaN, Infinity and duplicate keys are faults, and so is a Markdown fence around it.
    """
    try:
        return json.loads(text.strip(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        return _BROKEN


def broken(value: Any) -> bool:
    """True for what `parse` gives when a text is not JSON."""
    return value is _BROKEN


def json_valid(prediction: str) -> float:
    """1 when the answer is one JSON value and nothing else."""
    return float(not broken(parse(prediction)))


def load(path: Path) -> dict[str, Any]:
    """A JSON-schema file. Raises ConfigError when it is missing, not JSON or not a schema."""
    from jsonschema import exceptions, validators

    mend = "mend the file, or set eval.json_schema to another (null for none)"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the JSON schema cannot be read: {error}", where=str(path), mend=mend) from None
    schema = parse(text)
    if not isinstance(schema, dict):
        raise ConfigError("eval.json_schema is not a file with one JSON object", where=str(path), mend=mend)
    try:
        validators.validator_for(schema).check_schema(schema)
    except exceptions.SchemaError as error:
        raise ConfigError(f"not a JSON schema: {error.message}", where=str(path), mend=mend) from None
    return schema


class Validator:
    """A schema ready to check answers; references to other files are never fetched."""

    def __init__(self, schema: dict[str, Any]) -> None:
        from jsonschema import validators
        from referencing import Registry

        self._validator = validators.validator_for(schema)(schema, registry=Registry())

    def __call__(self, prediction: str) -> float:
        """1 when the answer is JSON and satisfies the schema."""
        value = parse(prediction)
        return float(not broken(value) and bool(self._validator.is_valid(value)))


def same(first: Any, second: Any) -> bool:
    """JSON equality: 1 is 1.0, but true is not 1, and the order of an object's keys does not matter."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def fields(prediction: str, reference: str) -> dict[str, bool]:
    """For each field of the reference object: does the answer have it with the same value. Empty if it is no object."""
    wanted, found = parse(reference), parse(prediction)
    if not isinstance(wanted, dict):
        return {}
    had = found if isinstance(found, dict) else {}
    return {key: key in had and same(value, had[key]) for key, value in wanted.items()}


def json_fields(prediction: str, references: Sequence[str]) -> float:
    """The share of the reference's fields that the answer has right; 1 or 0 where the reference is no object."""
    return max(_share_right(prediction, reference) for reference in references)


def _share_right(prediction: str, reference: str) -> float:
    right = fields(prediction, reference)
    if right:
        return sum(right.values()) / len(right)
    wanted, found = parse(reference), parse(prediction)
    return float(not broken(wanted) and not broken(found) and same(wanted, found))


def by_field(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of rows that have each field right, over the rows whose (first) reference has that field."""
    right: dict[str, list[bool]] = {}
    for prediction, options in zip(predictions, references, strict=True):
        for key, value in fields(prediction, options[0]).items():
            right.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in right.items()}
