"""Ollama's Modelfile: the GGUF file beside it, the template in Go's language, stops, parameters, the system text."""

from __future__ import annotations

from pathlib import Path

from sft.config.schema import Config, GenerationSection
from sft.errors import ModelError
from sft.ship.go_template import GoTemplate

MODELFILE = "Modelfile"


def write(
    folder: Path, weights: str, template: GoTemplate, stops: list[str], config: Config, system: str | None, context: int
) -> str:
    """Writes `folder`/Modelfile; returns its text. weights: the GGUF file's name. context: tokens that
    the model can see. Raises ModelError (see `_block`)."""
    lines = [
        f"FROM ./{weights}",
        f"TEMPLATE {_block(template.text())}",
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
        *(f"PARAMETER {name} {value}" for name, value in parameters(config.generation).items()),
        f"PARAMETER num_ctx {min(context, max(4096, config.model.max_seq_len + config.generation.max_new_tokens))}",
        *([f"SYSTEM {_block(system)}"] if system else []),
    ]
    text = "\n".join(lines) + "\n"
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    return text


def parameters(section: GenerationSection) -> dict[str, float | int]:
    """The run's own way of answering, in Ollama's words; greedy is temperature 0."""
    found: dict[str, float | int] = {"num_predict": section.max_new_tokens, "seed": section.seed}
    found["repeat_penalty"] = section.repetition_penalty
    if not section.do_sample:
        return {**found, "temperature": 0}
    return {**found, "temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}


def _block(text: str) -> str:
    if '"""' in text:
        raise ModelError('a text with """ in it cannot stand in a Modelfile', mend="FORMAT=gguf")
    return f'"""{text}"""'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
