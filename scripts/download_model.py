"""Downloads a model into the hub's cache; a broken download resumes where it stopped.

    python scripts/download_model.py                                       the config's model
    python scripts/download_model.py --model Qwen/Qwen2.5-1.5B-Instruct --revision main
    make download-model MODEL=Qwen/Qwen2.5-1.5B-Instruct

Writes only to the hub's cache (HF_HOME): safetensors, JSON, templates and tokenizer files, never pickles.
--allow-pickle converts a local folder's pickled weights to safetensors (tensors only). Needs no GPU, loads no model.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from sft import console

log = logging.getLogger("sft.model")


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__)
    add = flags.add_argument
    add("--model", metavar="NAME", help="hub id (default: the config's model.name)")
    add("--revision", metavar="REV", help="branch, tag or commit (default: the config's, else main)")
    add("--allow-pickle", action="store_true", help="convert a folder's pytorch_model.bin to safetensors")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Downloads what is missing, checks that the model is complete, and prints the next command."""
    from sft.model import hub

    root = console.project_root()
    section = _section(args, root)
    folder = hub.local_folder(section.name, root)
    if folder is not None and args.allow_pickle:
        written = convert_pickles(folder, section.name)
        names = ", ".join(path.name for path in written)
        console.say(f"written: {names}" if written else "the folder has safetensors already")
    elif folder is not None:
        console.say(f"{section.name} is on this machine already: nothing to download")
    elif not hub.is_import(section.name) and not hub.offline():
        hub.download(section, root)
    model = hub.find(section, root)
    console.say(
        f"{model.name} is complete: {model.size} parameters, {model.bytes / 1e6:,.0f} MB of weights"
        f"{f', revision {model.revision[:12]}' if model.revision else ''}\nwhere: {model.path}"
    )
    console.say(f"next:  make plan SET=model.name={model.name}   (does it fit?), then make train")
    return {
        "model": model.name,
        "path": str(model.path),
        "revision": model.revision,
        "kind": model.kind,
        "parameters": model.parameters,
        "bytes": model.bytes,
    }


def _section(args: argparse.Namespace, root: Path) -> Any:
    """The config's section `model` with the flags on top; no config is read where --model says all."""
    from sft.config.load import load
    from sft.config.schema import ModelSection

    if args.model and not args.set:
        return ModelSection(name=args.model, revision=args.revision)
    section = load(args.config, args.set, root=root).config.model
    flags = {"name": args.model, "revision": args.revision}
    return section.model_copy(update={key: value for key, value in flags.items() if value})


def convert_pickles(folder: Path, name: str) -> list[Path]:
    """Writes model*.safetensors beside pytorch_model*.bin and returns what it wrote; nothing if they exist already.

    Read with weights_only=True, which builds tensors and runs no other code of the file. Raises ModelError if there
    is nothing to convert or a file contains more than tensors.
    """
    import pickle

    import torch
    from safetensors.torch import save_file

    from sft import files
    from sft.errors import ModelError, one_line
    from sft.model.files import INDEX, has_weights

    if has_weights(folder):
        return []
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        log.warning("--allow-pickle: reading only the tensors of %s", path.name)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError) as error:
            what = f"{path.name} is no state dict of tensors, or is truncated: {one_line(error, 160)}"
            raise ModelError(what, where=str(path), fix="use a repository with model.safetensors") from None
        written.append(folder / path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors"))
        weight_map |= dict.fromkeys(tensors, written[-1].name)
        with files.atomic_file(written[-1]) as staged:
            save_file(tensors, staged, metadata={"format": "pt"})
    if not written:
        raise ModelError(f"{name} has no weights at all", where=str(folder), fix="name a folder with model weights")
    if len(written) > 1:
        size = sum(path.stat().st_size for path in written)
        files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return written


if __name__ == "__main__":
    console.run(parser(), main)
