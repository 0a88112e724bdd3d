"""The encoder for a config: template, tokenizer and the model's end tokens; the one way for every command."""

from __future__ import annotations

import logging
from pathlib import Path

from sft.chat.encode import Encoder, build_encoder
from sft.config.schema import Config, ModelSection
from sft.files import read_json
from sft.model import hub
from sft.model.files import ModelFiles
from sft.model.tokenizer import load_tokenizer, round_trip_problem

log = logging.getLogger("sft.generation")


def load_encoder(
    config: Config, root: Path, *, files: ModelFiles | None = None, tokenizer: ModelFiles | Path | None = None
) -> Encoder:
    """The encoder of `config`, with its tokenizer.

    files: the model, if it is known already; else `config.model` is looked up, of which a folder with tokenizer
    files is enough. tokenizer: used instead of the model's own (an adapter's). The end tokens of the model's
    generation_config are stops too. Raises ModelError (no tokenizer), TemplateError.
    """
    model = files or _files_without_weights(config.model, root)
    loaded = load_tokenizer(tokenizer or model, trust_remote_code=config.model.trust_remote_code)
    if files is None and (problem := round_trip_problem(loaded)):
        log.warning(problem)
    # a base may end its answers with other tokens than the tokenizer's end token
    ends = read_json(model.path / "generation_config.json").get("eos_token_id")
    ids = [int(token) for token in (ends if isinstance(ends, list) else [ends]) if token is not None]
    return build_encoder(config, loaded, model.kind, root, eos_ids=ids)


def load_named_encoder(config: Config, root: Path, *, tokenizer: str | None, template: str | None) -> Encoder:
    """`load_encoder` with a tokenizer folder and a template (a name or a file) from the command line, if given.

    Both count from the working folder.
    """
    if tokenizer:
        model = config.model.model_copy(update={"name": str(Path(tokenizer).resolve()), "revision": None})
        config = config.model_copy(update={"model": model})
    if template:
        path = str(Path(template).resolve()) if Path(template).is_file() else template
        config = config.model_copy(update={"data": config.data.model_copy(update={"template_path": path})})
    return load_encoder(config, root)


def _files_without_weights(section: ModelSection, root: Path) -> ModelFiles:
    folder = hub.local_folder(section.name, root)
    if folder is None or (folder / "config.json").is_file():
        return hub.find(section, root, weights=False)
    return ModelFiles(folder, section.name, None, {}, "seq2seq" if section.type == "seq2seq" else "causal")
