"""From merged settings to a Config, or to every mistake in them: place, key, what was expected, the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from sft.config.fields import Field, aliases, table
from sft.config.layers import Mapping
from sft.config.schema import Config
from sft.config.yaml_dialect import Node, plain, scalar
from sft.errors import ConfigError, SftError

# What other trainers call our keys; their users write these first.
ELSEWHERE = {
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "max_seq_length": "model.max_seq_len",
    "max_length": "model.max_seq_len",
    "sequence_len": "model.max_seq_len",
    "cutoff_len": "model.max_seq_len",
    "lora_r": "tuning.lora.r",
    "lora_rank": "tuning.lora.r",
    "lora_alpha": "tuning.lora.alpha",
    "lora_dropout": "tuning.lora.dropout",
    "lora_target": "tuning.lora.target_modules",
    "load_in_4bit": "tuning.mode",
    "adapter": "tuning.mode",
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accum",
    "lr_scheduler": "train.lr_scheduler_type",
    "mixed_precision": "train.bf16",
    "optimizer": "train.optim",
    "logging_steps": "logging.log_interval",
    "report_to": "logging.backend",
    "dataset": "data.raw_path",
}


def judge(tree: Mapping, problems: list[SftError], *, settled: bool = False) -> Config | None:
    """The Config, or None with every mistake added to `problems`.

    settled: the settings are a run's own resolved ones, where the last micro-batch of a step may be smaller.
    """
    across = _precisions(tree) + ([] if settled else _batches(tree))
    problems += across
    try:
        return Config.model_validate(_values(tree, ""), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    problems += _told(tree, [one for one in found if one["loc"] or not across])
    return None


def together(problems: Iterable[SftError], path: object) -> ConfigError:
    """One error that says them all, in the order of files and lines."""
    unique = {(problem.what, problem.where): problem for problem in problems}
    ordered = sorted(unique.values(), key=lambda problem: _order(problem.where or ""))
    if len(ordered) == 1:
        return ConfigError(ordered[0].what, where=ordered[0].where, mend=ordered[0].mend)
    return ConfigError(f"{len(ordered)} mistakes in the settings of {path}:", problems=ordered)


def _order(where: str) -> tuple[bool, str, int]:
    name, _, line = where.rpartition(":")
    return (where.startswith("--set"), name, int(line)) if line.isdigit() else (where.startswith("--set"), where, 0)


def _values(mapping: Mapping, prefix: str) -> dict[str, Any]:
    """Plain values for the schema; where it takes text alone, a number is taken as it was written."""
    values: dict[str, Any] = {}
    for key, node in mapping.items():
        field = table().get(prefix + key)
        if field and field.section and isinstance(node.value, dict):
            values[key] = _values(node.value, f"{prefix}{key}.")
        elif field and field.texts and isinstance(node.value, list):
            values[key] = [_as_text(item) for item in node.value]
        else:
            values[key] = _as_text(node) if field and field.text else plain(node)
    return values


def _as_text(node: Node) -> Any:
    number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
    return node.raw if number and node.raw is not None else plain(node)


def find(tree: Mapping, key: str) -> Node | None:
    """The node at a dotted key."""
    node: Node | None = Node(tree, "")
    for part in key.split("."):
        node = node.value.get(part) if node and isinstance(node.value, dict) else None
    return node


def _precisions(tree: Mapping) -> list[SftError]:
    bf16, fp16 = find(tree, "train.bf16"), find(tree, "train.fp16")
    if not (bf16 and fp16 and bf16.value is True and fp16.value is True):
        return []
    what = f"`train.bf16` ({bf16.where}) and `train.fp16` ({fp16.where}) are both true, and a run has one precision"
    mend = "remove both lines (`auto` picks what the hardware has), or set one of them to false"
    return [ConfigError(what, where=fp16.where, mend=mend)]


def _batches(tree: Mapping) -> list[SftError]:
    nodes = {name: find(tree, f"train.{name}") for name in ("effective_batch", "batch_size", "grad_accum")}
    given = {name: node for name, node in nodes.items() if node and type(node.value) is int}
    if len(given) < 3 or given["batch_size"].value * given["grad_accum"].value == given["effective_batch"].value:
        return []
    where = "; ".join(f"train.{name} {node.where}" for name, node in given.items())
    return [unequal_batches(*(node.value for node in given.values()), where=where)]


def unequal_batches(effective: int, batch: int, accum: int, *, where: str) -> ConfigError:
    """Three batch numbers that contradict each other."""
    what = f"train.batch_size {batch} * train.grad_accum {accum} is {batch * accum},"
    what += f" but train.effective_batch is {effective}"
    return ConfigError(what, where=where, mend="remove one of the three: it follows from the other two")


def _told(tree: Mapping, found: list[Any]) -> list[SftError]:
    """pydantic's errors in our words, one a key."""
    placed: dict[str, tuple[str, Node | None, Any]] = {}
    for one in found:
        key, item, node = _locate(tree, one["loc"])
        placed.setdefault(item, (key, node, one))
    told = []
    for item, (key, node, one) in placed.items():
        if not any(other.startswith(item + "[") for other in placed):
            told.append(_tell(key, item, node, one))
    return told


def _locate(tree: Mapping, loc: tuple[int | str, ...]) -> tuple[str, str, Node | None]:
    """The key, the item in it and its node; what pydantic adds to a path for members of a union is passed over."""
    node, keys, index = Node(tree, ""), [], ""
    for part in loc:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
            if index:
                index += f".{part}"
            else:
                keys.append(str(part))
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            index += f"[{part}]"
    key = ".".join(keys)
    return key, key + index, node if keys else None


def _tell(key: str, item: str, node: Node | None, one: Any) -> SftError:
    where = node.where if node else None
    field = table().get(key)
    if one["type"] == "value_error":
        said = str(one["msg"]).removeprefix("Value error, ")
        return ConfigError(f"`{key}`: {said}" if key else said, where=where, mend="see its row in docs/CONFIG.md")
    if field is None:
        return ConfigError(f"unknown key `{key}`", where=where, mend=nearest(key) or "see docs/CONFIG.md for every key")
    if one["type"] == "missing" and item == key and field.section:
        return ConfigError(f"`{key}`: `{one['loc'][-1]}` is missing", where=where, mend=_mend(field, node))
    if item != key and field.expected == "a list of mappings":
        return _in_list(item, where, node, one)
    expected = "text" if item != key else field.expected
    what = f"`{item}`: expected {expected}, not {_shown(node)}"
    return ConfigError(what, where=where, mend=_mend(field, node))


def _in_list(item: str, where: str | None, node: Node | None, one: Any) -> SftError:
    """A mistake inside one mapping of a list of mappings."""
    mend = f"see the row of `{item.partition('[')[0]}` in docs/CONFIG.md"
    if one["type"] == "extra_forbidden":
        return ConfigError(f"unknown key `{item}`", where=where, mend=mend)
    if one["type"] == "missing":
        return ConfigError(f"`{item}`: `{one['loc'][-1]}` is missing", where=where, mend=mend)
    if one["type"] == "model_type":
        return ConfigError(f"`{item}`: expected a mapping of keys, not {_shown(node)}", where=where, mend=mend)
    wanted = str(one["msg"]).removeprefix("Input ")
    return ConfigError(f"`{item}`: {wanted}, not {_shown(node)}", where=where, mend=mend)


def _shown(node: Node | None) -> str:
    value = plain(node) if node else None
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return "null" if value is None else f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return str(node.raw if node and node.raw else value)[:60]


def _mend(field: Field, node: Node | None) -> str:
    name, value = field.key.rpartition(".")[2], node.value if node else None
    if value is None:
        shown = "" if field.section else f" ({field.shown_default})"
        return f"remove the line to take the default{shown}"
    if isinstance(value, str):
        meant = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}.get(
            value.lower()
        )
        if meant and "`true`" in field.expected:
            return f"write `{name}: {meant}`"
        if node and node.raw is None and isinstance(scalar(value), int | float) and "number" in field.expected:
            return f"remove the quotes: `{name}: {value}`"
        if close := difflib.get_close_matches(value.lower(), field.choices, 1, 0.6):
            return f"did you mean `{close[0]}`?"
    if isinstance(value, str | int | float) and "a list of texts" in field.expected:
        return f"write it as a list: `{name}: [{node.raw if node and node.raw else value}]`"
    if isinstance(value, bool | int | float) and field.text:
        return f'put it in quotes: `{name}: "{node.raw if node else value}"`'
    if field.section:
        keys = [
            key for key in table() if key.startswith(field.key + ".") and key.count(".") == field.key.count(".") + 1
        ]
        return f"its keys are {', '.join(key.rpartition('.')[2] for key in keys)}, each on an indented line of its own"
    return f"the default is `{name}: {field.shown_default}`"


def nearest(key: str) -> str | None:
    """The likeliest key that was meant: the same name in another section, then a similar one."""
    section, _, name = key.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in [*table(), *aliases()]}
    here = [known for known in names if known.rpartition(".")[0] == section]
    hits = [known for known in names if names[known] == name]
    hits += [ELSEWHERE[name]] if name in ELSEWHERE else []
    if not hits and (close := difflib.get_close_matches(name, [names[known] for known in here], 1, 0.6)):
        hits = [known for known in here if names[known] == close[0]]
    if not hits and (close := difflib.get_close_matches(name, list(names.values()), 1, 0.7)):
        hits = [known for known in names if names[known] == close[0]]
    hits.sort(key=lambda known: (known.split(".")[0] != section.split(".")[0], not known.startswith("train.")))
    shown = " or ".join(f"`{hit}`" for hit in hits[:2])
    return f"did you mean {shown}?" if hits else None
