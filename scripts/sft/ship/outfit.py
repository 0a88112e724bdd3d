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
    import torch

    from sft.config.schema import Config

log = logging.getLogger("sft.ship")
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


def dress(folder: Path, files: ModelFiles, config: Config, root: Path, dtype: torch.dtype, *, beside: Path) -> None:
    """Puts everything but the weights into `folder`: the base's own tokenizer files byte for byte, config.json with
    `dtype`, generation_config.json with every end token, the chat template, and the run's config from `beside`.
    """
    for name in _TOKENIZER:
        if (files.path / name).is_file():
            shutil.copyfile(files.path / name, folder / name)
    if config.model.trust_remote_code:
        for code in files.path.glob("*.py"):
            shutil.copyfile(code, folder / code.name)
    _write(folder / "config.json", {**files.config, "dtype": str(dtype).removeprefix("torch.")})
    stops = _template(folder, files, config, root)
    _generation(folder, files, stops)
    for place in (beside, beside.parent):
        if (place / runs.RESOLVED).is_file():
            shutil.copyfile(place / runs.RESOLVED, folder / runs.RESOLVED)
            break


def _template(folder: Path, files: ModelFiles, config: Config, root: Path) -> list[int]:
    """Writes the chat template that the model was trained with; returns the ids of its end tokens."""
    from sft.chat.encode import encoder_for
    from sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(files, trust_remote_code=config.model.trust_remote_code)
    encoder = encoder_for(config, tokenizer, files.kind, root)
    template = encoder.template
    if "messages" in template.source:
        (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
        if (folder / "tokenizer_config.json").is_file():
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            if settings.pop("chat_template", None) is not None:
                _write(folder / "tokenizer_config.json", settings)
    else:
        log.warning(
            f"the template {template.name} takes system, user and assistant instead of messages: other libraries cannot"
            f" use it, so it stays in {runs.RESOLVED} alone"
        )
    return sorted(encoder.stops.ids)


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
