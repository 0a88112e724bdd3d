"""Fetches a model into the hub's cache; a broken download is taken up where it stopped.

    python scripts/download_model.py                                       # the config's model
    python scripts/download_model.py --model Qwen/Qwen2.5-1.5B-Instruct
    python scripts/download_model.py --model Qwen/Qwen2.5-1.5B-Instruct --revision main

Reads the config (for the name), writes to the hub's cache (HF_HOME) alone: safetensors, JSON, templates and tokenizer
files, never pickles. --allow-pickle makes safetensors of a local folder's pickled weights, tensors alone. Needs no GPU
and loads no model.
"""

from __future__ import annotations

import argparse
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = console.parser(
        "Fetch a model into the hub's cache, resumable.",
        """python scripts/download_model.py --model Qwen/Qwen2.5-1.5B-Instruct
make download-model MODEL=Qwen/Qwen2.5-1.5B-Instruct""",
    )
    made.add_argument("--model", metavar="NAME", help="hub id (default: the config's model.name)")
    made.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: the config's, else main)")
    made.add_argument(
        "--allow-pickle", action="store_true", help="make safetensors of a local folder's pytorch_model.bin"
    )
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Finds what is wanted, fetches what is missing, checks that it is whole, says what is next."""
    from sft.model import hub

    root = console.project_root()
    section = _section(args, root)
    there = hub.local_folder(section.name, root)
    if there is not None and args.allow_pickle:
        from sft.model import hub

        made = hub.convert(there, section.name)
        console.say(f"written: {', '.join(path.name for path in made)}" if made else "safetensors are there already")
    elif there is not None:
        console.say(f"{section.name} is a folder on this machine: nothing to fetch")
    elif not hub.offline():
        hub.download(section, root)
    found = hub.find(section, root)
    console.say(
        f"{found.name} is whole: {found.size} parameters, {found.bytes / 1e6:,.0f} MB of weights"
        f"{f', revision {found.revision[:12]}' if found.revision else ''}\nwhere: {found.path}"
    )
    console.say(f"next:  make plan SET=model.name={found.name}   (does it fit?), then make train")
    return {
        "model": found.name,
        "path": str(found.path),
        "revision": found.revision,
        "kind": found.kind,
        "parameters": found.parameters,
        "bytes": found.bytes,
    }


def _section(args: argparse.Namespace, root: Any) -> Any:
    from sft.config.load import load
    from sft.config.schema import ModelSection

    if args.model and not args.set:
        return ModelSection(name=args.model, revision=args.revision)
    section = load(args.config, args.set, root=root).config.model
    given = {"name": args.model, "revision": args.revision}
    return section.model_copy(update={key: value for key, value in given.items() if value})


if __name__ == "__main__":
    console.run(parser(), main)
