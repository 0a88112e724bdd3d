"""An encoder from a configuration, for commands that look at rows without loading a model."""

from __future__ import annotations

import logging
from pathlib import Path

from sft.chat.encode import Encoder, encoder_for
from sft.config.schema import Config, DataSection
from sft.data import store
from sft.errors import DataError
from sft.model import hub
from sft.model.tokenizer import load_tokenizer, round_trip_problem

log = logging.getLogger("sft.preflight.checks")


def encoder_of(config: Config, root: Path, *, tokenizer: str | None = None, template: str | None = None) -> Encoder:
    """The encoder that training with `config` uses. A folder with tokenizer files alone will do as a model.

    tokenizer, template: a folder and a name or file from the command line, counted from the working folder.
    """
    model = config.model
    folder = Path(tokenizer) if tokenizer else hub.local_folder(model.name, root)
    if folder is not None and not (folder / "config.json").is_file():
        kind = "seq2seq" if model.type == "seq2seq" else "causal"
        loaded = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    else:
        section = model if folder is None else model.model_copy(update={"name": str(folder.resolve())})
        files = hub.find(section, root, weights=False)
        kind, loaded = files.kind, load_tokenizer(files, trust_remote_code=model.trust_remote_code)
    if problem := round_trip_problem(loaded):
        log.warning(problem)
    if template:
        here = Path(template)
        named = str(here.resolve()) if here.is_file() else template
        config = config.model_copy(update={"data": config.data.model_copy(update={"template_path": named})})
    return encoder_for(config, loaded, "seq2seq" if kind == "seq2seq" else "causal", root)


def row_file(data: DataSection, root: Path, split: str) -> Path:
    """The config's rows of one split. Raises DataError where there are none."""
    stage = store.resolve_stage(data, root)
    found = {"train": stage.train, "val": stage.val, "test": stage.test}[split]
    if found is None:
        raise DataError(f"there are no {split} rows", where=f"data.{split}_path", fix="make process")
    return found
