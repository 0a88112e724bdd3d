"""A merged model loaded as anyone would load it, and asked one question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import runs
from sft.config.schema import Config, ModelSection, TuningSection
from sft.errors import ModelError, RunError


@dataclass(frozen=True)
class Trial:
    """One answer. stopped: it ended by itself. tokens: tokens made, its end included."""

    text: str
    stopped: bool
    tokens: int


def answer(folder: Path, prompt: str, root: Path) -> Trial:
    """The model's greedy answer to `prompt` as a single user turn. Raises ModelError (no model, logits not finite)."""
    import torch

    from sft.chat.encode import encoder_for
    from sft.generation.engine import generate
    from sft.model import hub, loading
    from sft.model.tokenizer import load_tokenizer

    if not folder.is_dir():
        raise ModelError(f"there is no merged model in {folder}", where=str(folder), mend="make merge")
    config = _config(folder)
    section = ModelSection(name=str(folder.absolute()), trust_remote_code=config.model.trust_remote_code)
    files = hub.find(section, root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(files.config.get("dtype", "float32")))
    tokenizer = load_tokenizer(files, trust_remote_code=section.trust_remote_code)
    model: Any = loading.load_base(files, section, TuningSection(mode="lora"), dtype, device=device, train=False)
    encoder = encoder_for(config, tokenizer, files.kind, root)
    ids = encoder.prompt([{"role": "user", "content": prompt}])
    _refuse_infinite(model, ids, files.kind, device)
    found = generate(model, tokenizer, [ids], config.generation, encoder.stops, batch_size=1, kind=files.kind)[0]
    return Trial(found.text, found.stopped, found.tokens)


def _refuse_infinite(model: Any, ids: list[int], kind: str, device: str) -> None:
    import torch

    given = torch.tensor([ids], device=device)
    extra = {"decoder_input_ids": given[:, :1]} if kind == "seq2seq" else {}
    with torch.no_grad():
        logits = model(input_ids=given, **extra).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the merged model's logits are not finite", mend="merge again with --dtype bf16 or fp32")


def _config(folder: Path) -> Config:
    try:
        return runs.run_of_adapter(folder)
    except RunError:
        return Config()
