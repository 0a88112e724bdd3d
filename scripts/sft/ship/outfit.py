"""What a shipped model needs besides weights: config, tokenizer, the chat template it was trained with, its stops."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import runs
from sft.model.files import ModelFiles

if TYPE_CHECKING:
    from sft.chat.template import ChatTemplate
    from sft.config.schema import Config

log = logging.getLogger("sft.ship")
# A template of turns inside one of messages: up to its answer for a prompt, spaces at the end left to the answer.
_TURN = """{%- set turn = namespace(system='', user=none, assistant=none) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}{%- set turn.system = message['content'] -%}
{%- elif message['role'] == 'user' and turn.user is none -%}{%- set turn.user = message['content'] -%}
{%- elif message['role'] == 'assistant' and turn.assistant is none -%}{%- set turn.assistant = message['content'] -%}
{%- else -%}{{- raise_exception('the template takes one system, user and assistant text') -}}{%- endif -%}
{%- endfor -%}
{%- set system, user = turn.system, turn.user -%}
{%- set assistant = '\U000ffff2' if turn.assistant is none else turn.assistant -%}
{%- set text -%}SOURCE{%- endset -%}
{{- text.split('\U000ffff2')[0].rstrip(' ') if turn.assistant is none else text -}}"""
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


def dress(
    folder: Path,
    files: ModelFiles,
    config: Config,
    root: Path,
    dtype: str,
    *,
    beside: Path,
    settings: dict[str, Any] | None = None,
    grown: bool = False,
) -> None:
    """Puts everything but the weights into `folder`: the tokenizer files byte for byte, config.json with `dtype` (fp16,
    bf16, fp32) and `settings`, generation_config.json with every end token, the chat template, the run's config.

    beside: the adapter. grown: the vocabulary is the adapter's, so the tokenizer files are those that lie beside it.
    """
    own = grown and any((beside / name).is_file() for name in _TOKENIZER)
    if grown and not own:
        log.warning(f"the adapter has a larger vocabulary than {files.name}, and no tokenizer beside it")
    for name in _TOKENIZER:
        if ((beside if own else files.path) / name).is_file():
            shutil.copyfile((beside if own else files.path) / name, folder / name)
    if config.model.trust_remote_code:
        for code in files.path.glob("*.py"):
            shutil.copyfile(code, folder / code.name)
    kept = {key: value for key, value in files.config.items() if key != "torch_dtype"}
    _write(folder / "config.json", {**kept, "dtype": _DTYPES[dtype], **(settings or {})})
    _generation(folder, files, _template(folder, files, beside if own else files, config, root))
    for place in (beside, beside.parent):
        if (place / runs.RESOLVED).is_file():
            shutil.copyfile(place / runs.RESOLVED, folder / runs.RESOLVED)
            break


def _template(folder: Path, files: ModelFiles, source: ModelFiles | Path, config: Config, root: Path) -> list[int]:
    """Writes the chat template that the model was trained with; returns the ids of its end tokens."""
    from sft.chat.encode import encoder_for
    from sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source, trust_remote_code=config.model.trust_remote_code)
    encoder = encoder_for(config, tokenizer, files.kind, root)
    template = encoder.template
    (folder / "chat_template.jinja").write_text(for_all(template), encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.pop("chat_template", None) is not None:
            _write(folder / "tokenizer_config.json", settings)
    return sorted(encoder.stops.ids)


def for_all(template: ChatTemplate) -> str:
    """The template as one text that any library can use: options set in it, both variants of one that has two, and one
    of turns (system, user, assistant) told as one of messages.
    """
    source = template.source
    if template.style == "turn":
        source = _TURN.replace("SOURCE", source)
    elif template.tool_source is not None:
        source = "{% if tools %}" + template.tool_source + "{% else %}" + source + "{% endif %}"
    options = "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value} -%}}"
        for name, value in template.options.items()
    )
    return options + source


def _generation(folder: Path, files: ModelFiles, stops: list[int]) -> None:
    source = files.path / "generation_config.json"
    settings: dict[str, Any] = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    old = settings.get("eos_token_id", [])
    ends = sorted({*stops, *(old if isinstance(old, list) else [old])})
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    _write(folder / "generation_config.json", settings)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
