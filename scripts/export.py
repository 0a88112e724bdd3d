"""Exports what a run trained: GGUF for llama.cpp, a folder for Ollama, safetensors for transformers and vLLM.

    python scripts/export.py --format gguf                         the newest run -> outputs/export/<run>-gguf
    python scripts/export.py --format ollama --type q8_0           -> outputs/export/<run>-ollama-q8_0
    python scripts/export.py --format hf --adapters adapters/run --out DIR

    python scripts/export.py --format gguf --converter ~/llama.cpp/convert_hf_to_gguf.py      for other architectures

Adapters are merged first, tensor by tensor. Every tensor is read back and compared; parity.json proves that the
exported form gets the same tokens as in training and stops where its answers ended. A difference refuses the export.
Where llama-cpp-python is installed, the token ids are llama.cpp's own, and the held-out loss there is measured.
K-quants need it; without it f16 is written, and the command that quantises it is printed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import console

NEXT = {
    "gguf": """next: llama-server -m {out}/{name}-{type}.gguf --jinja
      (llama.cpp; llama-cli chats in the terminal; LM Studio: lms import FILE; Ollama: make export FORMAT=ollama)""",
    "ollama": "next: cd {out} && ollama create {name} -f Modelfile && ollama run {name}",
    "hf": """next: python scripts/infer.py --merged {out}
      vllm serve {out}""",
}


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__)
    add = flags.add_argument
    add("--format", choices=["gguf", "ollama", "hf"], default="gguf", help="default: gguf")
    types = ["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "bf16", "f32"]
    add("--type", choices=types, default="f16", help="of the weights (default: f16)")
    add("--converter", metavar="FILE", type=Path, help="llama.cpp's convert_hf_to_gguf.py, to write the GGUF file")
    source = flags.add_mutually_exclusive_group()
    source.add_argument("--adapters", metavar="DIR", type=Path, help="an adapter (default: the newest run's)")
    source.add_argument("--merged", metavar="DIR", type=Path, help="a merged model, or a full fine-tune")
    add("--out", metavar="DIR", type=Path, help="default: outputs/export/RUN-FORMAT[-TYPE]")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Resolves the model, exports it with a progress bar, and prints what was checked."""
    from rich.filesize import decimal

    from sft.config.load import display_path
    from sft.files import read_json
    from sft.generation.load import resolve_model, system_text
    from sft.model.gguf import has_llama_cpp
    from sft.report.compare import FOLDER, RESULT
    from sft.report.model_card import card
    from sft.ship import gguf
    from sft.ship.export import export

    root = console.project_root()
    default = args.config == console.default_config()
    config = Path(args.config)
    target = resolve_model(config, args.set, adapters=args.adapters, merged=args.merged, is_default=default, root=root)
    by_hand = args.type in gguf.K_QUANTS and not has_llama_cpp() and args.format != "hf"
    kind = gguf.K_SOURCE if by_hand else args.type
    name = f"{target.name}-{args.format}{'' if kind == 'f16' else f'-{kind}'}"  # a type does not replace another one
    out = args.out or root / "outputs" / "export" / name
    weights = f"{target.name}-{kind}.gguf" if args.format != "hf" else ""
    text = card(
        target.config,
        target.name,
        args.format,
        result=(read_json(target.run.folder / FOLDER / RESULT) or None) if target.run else None,
        weights=weights,
        exported=True,
        system=system_text(target.config, target.folder, root),
    )
    with console.progress(f"exporting as {args.format}") as advance:
        report = export(target, args.format, kind, out, root, card=text, converter=args.converter, progress=advance)
    certificate = report.parity
    rows = [(name, decimal(size)) for name, size in report.files.items() if size > 1e5]
    if report.largest_error is not None:
        rows.append(("read back", f"{report.tensors} tensors, largest error {report.largest_error:.2g}"))
    if loss := report.loss:
        change = f"{loss['model']:.4f} -> {loss['llama_cpp']:.4f} in llama.cpp as {kind}"
        rows.append((f"loss on {loss['held_out_rows']} rows of {loss['held_out']}", change))
    elif args.format != "hf":
        rows.append(("loss in llama.cpp", "not measured: pip install llama-cpp-python"))
    tokenizer = f" (token ids by llama-cpp-python {report.llama_cpp})" if report.llama_cpp else ""
    rows += [
        ("parity", f"{certificate['tokens']:,} tokens of {certificate['rows']} rows are equal"),
        ("  in", ", ".join(certificate["routes"]) + tokenizer),
        ("time", f"{report.seconds:.0f} s"),
    ]
    if certificate["set_aside"]:
        rows.append(("not compared", f"{len(certificate['set_aside'])} rows (parity.json says why)"))
    shown = display_path(out, root)
    console.table(f"exported to {shown}", ["", "value"], rows)
    if by_hand:
        console.warn(f"llama-cpp-python is not installed: the weights are {kind}. {args.type} is one more command:")
        path, name = f"{shown}/{target.name}", gguf.K_QUANTS[args.type]
        command = f"llama-quantize {path}-{kind}.gguf {path}-{args.type}.gguf {name}"
        if args.format == "ollama":  # which makes no other K-quant itself since its version 0.7
            command += f" && sed -i s/-{kind}.gguf/-{args.type}.gguf/ {shown}/Modelfile"
            if name == "Q4_K_M":
                command = f"cd {shown} && ollama create {target.name} --quantize q4_K_M -f Modelfile"
        console.say(command)
    console.say(console.as_typed(NEXT[args.format].format(out=shown, name=target.name, type=kind)))
    return asdict(report)


if __name__ == "__main__":
    console.run(parser(), main)
