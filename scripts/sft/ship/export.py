"""The model card of an export: the one that `make compare` wrote for the run, else a short one with what is known."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft import files as disk
from sft import runs
from sft.chat.encode import Encoder, encoder_for
from sft.config import load
from sft.config.schema import Config, GenerationSection, ModelSection
from sft.errors import ModelError, RunError
from sft.generation.load import Target, system_text
from sft.model import hub
from sft.model.files import ModelFiles
from sft.model.tokenizer import load_tokenizer
from sft.ship import gguf as gguf_file
from sft.ship import gguf as gguf_layout
from sft.ship import gguf as gguf_vocabulary
from sft.ship import merge, verify
from sft.ship import parity as go_template
from sft.ship import parity as golden
from sft.ship import parity as parity_module
from sft.ship import parity as routes
from sft.ship.parity import GoTemplate


def of(target: Target, form: str) -> str:
    """README.md of an export with the hub's header. form: gguf, ollama or hf."""
    from huggingface_hub import ModelCard, ModelCardData

    written = target.run.folder / "report" / "README.md" if target.run else None
    library = "transformers" if form == "hf" else "gguf"
    if written is not None and written.is_file():
        card = ModelCard(written.read_text(encoding="utf-8"))
        card.data["library_name"] = library
        return str(card)
    base = target.config.model.name
    data = ModelCardData(
        base_model=None if load.is_model_folder(base) else base,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["sft-play", "fine-tuned", *target.config.experiment.tags],
        model_name=target.name,
    )
    tuning = target.config.tuning
    how = (
        "a full fine-tune" if tuning.mode == "full" else f"{tuning.mode} (r {tuning.lora.r}, alpha {tuning.lora.alpha})"
    )
    about = f"{target.config.experiment.description}\n\n" if target.config.experiment.description else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {target.config.experiment.name or target.name}\n\n"
        f"{about}Made with sft-play from `{load.model_name(base)}`: {how}, merged. How good it"
        " is was not measured when this was exported (`make compare` writes a card with figures).\n\n"
        "`parity.json` proves that the exported form is asked, token by token, as in training.\n"
    )


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
        raise ModelError('a text with """ in it cannot stand in a Modelfile', fix="FORMAT=gguf")
    return f'"""{text}"""'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


EXPORT = "export.json"
_MERGED_AS = {"f16": "fp16", "q8_0": "fp16", "bf16": "bf16", "f32": "fp32"}
_OWN_ROWS = 200
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ExportReport:
    """What was exported: the folder, its files with their bytes, how far it is from the weights, and the certificate.

    largest_error: of a number, against the merged weights. trial: the model loaded again and asked (hf).
    """

    out: str
    format: str
    type: str
    files: dict[str, int]
    tensors: int
    largest_error: float
    parity: dict[str, Any]
    trial: verify.SmokeTest | None
    seconds: float


def export(target: Target, form: str, kind: str, out: Path, root: Path, progress: Progress) -> ExportReport:
    """Exports `target` to the folder `out`, or leaves `out` as it was.

    form: gguf, ollama or hf. kind: f16, q8_0, bf16 or f32. Raises ModelError (not covered, does not fit the type),
    TemplateError (parity), EnvironmentProblem (disk), RunError (`out` is in the way).
    """
    started = time.monotonic()
    if not target.tuned:
        raise ModelError("there is nothing tuned to export", where="--base", fix="make train, or name --adapters")
    if form == "hf" and kind == "q8_0":
        raise ModelError("safetensors are not written as q8_0", where="--type", fix="TYPE=f16, bf16 or f32")
    out = out.absolute()
    _refuse_target(out)
    merge.require_space(out, 0, "an export")
    disk.sweep(out.parent, out.name)
    trusted = target.config.model.trust_remote_code
    if (before := _before(target, root)) is not None:  # a merge may take long
        _refuse_uncovered(before, form, trusted)
    with disk.atomic_folder(out) as staged:
        folder = _weights(target, form, _MERGED_AS[kind], staged, root, progress)
        files = hub.find(ModelSection(name=str(folder), type=target.config.model.type), root)
        _refuse_uncovered(files, form, trusted)
        trainer = _encoder(target, files, root)
        forms = [routes.of_folder(folder, trust_remote_code=trusted)]
        tensors, error = 0, 0.0
        if form != "hf":
            tensors, error = _gguf(files, staged, kind, form, trainer, target, root, forms, progress)
        certificate = asdict(_certify(trainer, forms, target.config, root))
        asked = verify.smoke_test(folder, None, root) if form == "hf" else None
        if folder.parent == staged and form == "hf":
            _lift(folder, staged)
        elif folder.parent == staged:
            shutil.rmtree(folder)
        disk.write_json(staged / parity_module.PARITY, certificate)
        disk.write_text(staged / "README.md", of(target, form))
        listed = {path.name: path.stat().st_size for path in sorted(staged.iterdir()) if path.is_file()}
        seconds = round(time.monotonic() - started, 1)
        report = ExportReport(str(out), form, kind, listed, tensors, error, certificate, asked, seconds)
        disk.write_json(staged / EXPORT, asdict(report))
    return report


def _weights(target: Target, form: str, dtype: str, staged: Path, root: Path, progress: Progress) -> Path:
    """The folder with the model's whole weights: merged into `staged`, or where a full run left them."""
    if target.adapter is not None:
        moved = _moved(target, _own_config(target.adapter))
        merge.merge(target.adapter, staged / "weights", dtype, root, progress, base=moved)
        return staged / "weights"
    assert target.merged is not None
    if form == "hf":
        merge.convert_full_run(target.merged, staged / "weights", dtype, target.config, root, progress)
        return staged / "weights"
    return target.merged


def _before(target: Target, root: Path) -> ModelFiles | None:
    """The model that the weights are made from; None for an adapter with no config beside it: its record says."""
    if target.adapter is None:
        return hub.find(target.config.model.model_copy(update={"name": str(target.merged), "revision": None}), root)
    own = _own_config(target.adapter)
    return merge.find_base(own.model, _moved(target, own), target.adapter, root) if own else None


def _moved(target: Target, own: Config | None) -> str | None:
    """Where --set says that the base is now; None where the run's own config says it."""
    name = target.config.model.name
    return name if own and name != own.model.name else None


def _own_config(adapter: Path) -> Config | None:
    try:
        return runs.run_of_adapter(adapter)
    except RunError:
        return None


def _refuse_uncovered(files: ModelFiles, form: str, trusted: bool) -> None:
    if files.kind == "seq2seq":
        raise ModelError(
            "export covers models that continue a conversation; this one is seq2seq",
            where=files.name,
            fix="make merge: its folder is what any library loads",
        )
    if form != "hf":
        gguf_layout.architecture(files.config, files.name)
        gguf_vocabulary.refuse_other_kinds(load_tokenizer(files, trust_remote_code=trusted))


def _encoder(target: Target, files: ModelFiles, root: Path) -> Encoder:
    """The encoder that the run was trained with: with the tokenizer kept beside the adapter, or the base's own."""
    config, kept = target.config, target.folder
    source: Any = kept if kept and (kept / "tokenizer_config.json").is_file() else hub.find(config.model, root)
    tokenizer = load_tokenizer(source, trust_remote_code=config.model.trust_remote_code)
    roomy = config.model.model_copy(update={"max_seq_len": 1 << 20})
    return encoder_for(config.model_copy(update={"model": roomy}), tokenizer, files.kind, root)


def _gguf(
    files: ModelFiles,
    staged: Path,
    kind: str,
    form: str,
    trainer: Encoder,
    target: Target,
    root: Path,
    forms: list[parity_module.Route],
    progress: Progress,
) -> tuple[int, float]:
    """Writes and checks the GGUF file (and the Modelfile), adds their routes; returns tensors and the largest error."""
    import gguf

    merge.require_space(staged, int(files.parameters * gguf_file.BYTES[kind]), "the GGUF file")
    vocabulary = _vocabulary(files, trainer, target)
    name = f"{target.name}-{kind}.gguf"
    source = (files.path / "chat_template.jinja").read_text(encoding="utf-8")
    tensors = gguf_file.write(files, staged / name, kind, vocabulary, source, progress)
    error = gguf_file.check(files, staged / name, progress)
    reader = gguf.GGUFReader(staged / name)
    held = gguf_vocabulary.of_file(reader)
    template = reader.get_field("tokenizer.chat_template")
    forms.append(routes.of_gguf(held, str(template.contents()) if template else "", trainer.tokenizer))
    if form == "ollama":
        begin = held.tokens[held.bos] if held.adds_bos and held.bos is not None else ""
        told = go_template.translate(trainer.template, begin)
        stops = [str(trainer.tokenizer.convert_ids_to_tokens(token)) for token in sorted(trainer.stops.ids)]
        stops = list(dict.fromkeys([*stops, *trainer.stops.strings, *target.config.generation.stop]))
        system = system_text(target.config, target.folder, root)
        context = int(files.config["max_position_embeddings"])
        write(staged, name, told, stops, target.config, system, context)
        forms.append(routes.of_ollama(held, told, stops))
    return tensors, error


def _vocabulary(files: ModelFiles, trainer: Encoder, target: Target) -> gguf_vocabulary.Vocabulary:
    """The tokenizer for llama.cpp, its first end token the one that ends answers, begin tokens as training has them."""
    tokenizer = load_tokenizer(files, trust_remote_code=target.config.model.trust_remote_code)
    ended = [trainer.encode(row) for row in golden.ROWS]
    last = [row.labels[-1] for row in ended if row.dropped is None and row.labels and row.labels[-1] >= 0]
    last += [row.labels[-2] for row in ended if row.dropped is None and len(row.labels) > 1 and row.labels[-2] >= 0]
    ends = [token for token in dict.fromkeys(last) if token in trainer.stops.ids]
    ends = list(dict.fromkeys([*ends, *sorted(trainer.stops.ids)]))
    begins = tokenizer.bos_token_id is not None and trainer.prompt(golden.ROWS[0])[:1] == [tokenizer.bos_token_id]
    texts = [row["messages"][0]["content"] for row in golden.ROWS]
    rows = int(files.config["vocab_size"])
    return gguf_vocabulary.of_tokenizer(tokenizer, rows, ends, adds_bos=begins, texts=texts)


def _certify(
    trainer: Encoder, forms: list[parity_module.Route], config: Config, root: Path
) -> parity_module.Certificate:
    own = verify.run_rows(config, root)
    rows = [*golden.ROWS, *verify.shipped_rows(root), *(own[1][:_OWN_ROWS] if own else [])]
    return parity_module.certify(trainer, forms, rows, ["golden", "data/samples", *([own[0]] if own else [])])


def _lift(folder: Path, staged: Path) -> None:
    """Moves the files of a folder up into the folder that it stands in."""
    for path in sorted(folder.iterdir()):
        path.replace(staged / path.name)
    folder.rmdir()


def _refuse_target(out: Path) -> None:
    """`out` may be new, empty, or an earlier export."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / EXPORT).is_file())):
        raise RunError(f"{out} is in the way: it is no export", where=str(out), fix="name another folder: --out")
