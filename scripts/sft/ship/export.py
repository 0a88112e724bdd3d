"""Exports a tuned model to a folder: weights as GGUF or safetensors, Ollama's Modelfile, a certificate of parity."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from sft import files as disk
from sft import runs
from sft.chat.encode import Encoder
from sft.config.schema import Config, ModelSection
from sft.errors import ModelError, RunError
from sft.generation.encoder import load_encoder
from sft.generation.load import Target, system_text
from sft.model import hub
from sft.model.files import ModelFiles
from sft.model.gguf import Vocabulary, has_llama_cpp, llama_cpp, vocabulary_of_file
from sft.model.tokenizer import load_tokenizer
from sft.ship import EXPORT_REPORT, PARITY, gguf, merge, parity, verify
from sft.ship.lora_delta import Progress
from sft.ship.parity import GOLDEN_ROWS, GoTemplate, Route

MODELFILE = "Modelfile"
_MERGE_DTYPE = {"bf16": "bf16", "f32": "fp32"}  # of the weights that the file is made from; else fp16
_RUN_ROWS = 200  # of the run's own rows that parity compares


@dataclass(frozen=True)
class ExportReport:
    """What was exported: the content of export.json.

    files: bytes by name. largest_error: of a number in the GGUF file (of a K-quant: in the f16 file that it was made
    from), against the merged weights; None if llama.cpp's converter wrote it. llama_cpp: the version of
    llama-cpp-python that gave token ids and loss, None without it. loss: on held-out rows, `model` (the weights, in
    float32) and `llama_cpp` (the GGUF file there). parity: see `parity.Certificate`.
    """

    out: str
    format: str
    type: str
    files: dict[str, int]
    tensors: int
    largest_error: float | None
    llama_cpp: str | None
    loss: dict[str, Any] | None
    parity: dict[str, Any]
    seconds: float


def export(
    target: Target,
    form: str,
    kind: str,
    out: Path,
    root: Path,
    *,
    card: str,
    converter: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Exports `target` to the folder `out`, or leaves `out` unchanged. card: the text of its README.md.

    form: gguf, ollama or hf. kind: f16, q8_0, bf16, f32, or one of gguf.K_QUANTS, which needs llama-cpp-python.
    converter: llama.cpp's convert_hf_to_gguf.py, which writes the GGUF file instead of us.
    Raises ModelError (not supported, does not fit the type), TemplateError (parity), EnvironmentProblem (disk),
    RunError (`out` holds something else).
    """
    started = time.monotonic()
    if not target.tuned:
        raise ModelError("the base has nothing to export", where="--base", fix="make train, or --adapters DIR")
    if form == "hf" and kind not in ("f16", "bf16", "f32"):
        raise ModelError(f"safetensors cannot be written as {kind}", where="--type", fix="--type f16, bf16 or f32")
    converter = _converter(converter, form)
    out = out.absolute()
    merge.require_replaceable(out, EXPORT_REPORT, "an export")
    merge.require_space(out, 0, "the export")
    own_config: Config | None = None
    with suppress(RunError):  # an adapter without a config beside it: adapter_config.json names its base
        own_config = runs.run_of_adapter(target.adapter) if target.adapter else None
    base = target.config.model.name  # where --set says that the base is now
    moved_base = base if own_config and base != own_config.model.name else None
    if target.merged is not None:
        _refuse_unsupported(_model_files(target, target.merged, root), form, target.config, converter)
    elif target.adapter is not None and own_config is not None:  # before a merge, which may take long
        base_files = merge.find_base(own_config.model, moved_base, target.adapter, root)
        _refuse_unsupported(base_files, form, target.config, converter)
    with disk.atomic_folder(out) as staged:
        folder = _whole_weights(target, form, _MERGE_DTYPE.get(kind, "fp16"), moved_base, staged, root, progress)
        files = _model_files(target, folder, root)
        _refuse_unsupported(files, form, target.config, converter)
        encoder = _training_encoder(target, files, root)
        routes = [parity.route_of_folder(folder, trust_remote_code=target.config.model.trust_remote_code)]
        figures: dict[str, Any] = {"tensors": 0, "largest_error": None, "llama_cpp": None, "loss": None}
        if form != "hf":
            figures, of_file = _write_gguf(files, staged, kind, form, encoder, target, root, converter, progress)
            routes += of_file
        own = verify.run_rows(target.config, root)
        rows = [*GOLDEN_ROWS, *verify.shipped_rows(root), *(own[1][:_RUN_ROWS] if own else [])]
        sources = ["golden", "data/samples", *([own[0]] if own else [])]
        certificate = asdict(parity.certify(encoder, routes, rows, sources))
        if folder.parent == staged:
            for path in folder.iterdir() if form == "hf" else ():
                path.replace(staged / path.name)
            shutil.rmtree(folder)
        disk.write_json(staged / PARITY, certificate)
        disk.write_text(staged / "README.md", card)
        sizes = {path.name: path.stat().st_size for path in sorted(staged.iterdir()) if path.is_file()}
        seconds = round(time.monotonic() - started, 1)
        report = ExportReport(str(out), form, kind, sizes, **figures, parity=certificate, seconds=seconds)
        disk.write_json(staged / EXPORT_REPORT, asdict(report))
    return report


def _model_files(target: Target, folder: Path, root: Path) -> ModelFiles:
    return hub.find(ModelSection(name=str(folder), type=target.config.model.type), root)


def _converter(path: Path | None, form: str) -> Path | None:
    """llama.cpp's converter, of which the folder of llama.cpp may be named. Raises ModelError if it is not there."""
    if path is not None and form == "hf":
        raise ModelError("a converter writes GGUF files", where="--converter", fix="--format gguf, or --format ollama")
    file = path / "convert_hf_to_gguf.py" if path is not None and path.is_dir() else path
    if file is not None and not file.is_file():
        raise ModelError(f"{file} does not exist", where="--converter", fix=gguf.CONVERTER)
    return file


def _refuse_unsupported(files: ModelFiles, form: str, config: Config, converter: Path | None) -> None:
    if files.kind == "seq2seq":
        what = "export supports decoder-only models; this one is seq2seq"
        raise ModelError(what, where=files.name, fix="make merge: its folder is what any library loads")
    if form != "hf" and converter is None:
        gguf.architecture(files.config, files.name)
        gguf.byte_level_bpe(load_tokenizer(files, trust_remote_code=config.model.trust_remote_code))


def _whole_weights(
    target: Target, form: str, dtype: str, moved_base: str | None, staged: Path, root: Path, progress: Progress
) -> Path:
    """The folder with the model's whole weights: merged or converted into `staged`, or where a full run left them."""
    if target.adapter is not None:
        merge.merge(target.adapter, staged / "weights", dtype, root, progress, base=moved_base)
        return staged / "weights"
    assert target.merged is not None
    if form != "hf":
        return target.merged
    merge.convert_full_run(target.merged, staged / "weights", dtype, target.config, root, progress)
    return staged / "weights"


def _training_encoder(target: Target, files: ModelFiles, root: Path) -> Encoder:
    """The run's encoder for rows of any length: with the tokenizer saved beside the adapter, or the base's own."""
    config, folder = target.config, target.folder
    saved = folder is not None and (folder / "tokenizer_config.json").is_file()
    source: Any = folder if saved else hub.find(config.model, root)
    any_length = config.model.model_copy(update={"max_seq_len": 1 << 20})
    return load_encoder(config.model_copy(update={"model": any_length}), root, files=files, tokenizer=source)


def _write_gguf(
    files: ModelFiles,
    staged: Path,
    kind: str,
    form: str,
    encoder: Encoder,
    target: Target,
    root: Path,
    converter: Path | None,
    progress: Progress,
) -> tuple[dict[str, Any], list[Route]]:
    """Writes and checks the GGUF file (and the Modelfile); what `ExportReport` says of it, and their routes."""
    k_quant = kind in gguf.K_QUANTS
    first = gguf.K_SOURCE if k_quant else kind
    merge.require_space(staged, int(files.parameters * gguf.BYTES[first] * (1.5 if k_quant else 1)), "the GGUF file")
    path, largest_error = staged / f"{target.name}-{first}.gguf", None
    if converter is not None:
        tensors = gguf.convert(converter, files.path, path, first, target.name)
    else:
        source = (files.path / "chat_template.jinja").read_text(encoding="utf-8")
        tensors = gguf.write(files, path, first, _vocabulary(files, encoder, target.config), source, progress)
        largest_error = gguf.check(files, path, first, progress)
    if k_quant:
        full, path = path, staged / f"{target.name}-{kind}.gguf"
        gguf.quantize(full, path, kind)
        full.unlink()
    reader = GGUFReader(path)
    vocabulary = vocabulary_of_file(reader)
    begin = vocabulary.tokens[vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else ""
    text_ids = gguf.text_ids(path, begin)
    template = reader.get_field("tokenizer.chat_template")
    written = str(template.contents()) if template else ""
    routes = [parity.route_of_gguf(vocabulary, written, encoder.tokenizer, text_ids)]
    if form == "ollama":
        go_template = parity.go_template(encoder.template, begin)
        stops = [str(encoder.tokenizer.convert_ids_to_tokens(token)) for token in sorted(encoder.stops.ids)]
        stops = list(dict.fromkeys([*stops, *encoder.stops.strings, *target.config.generation.stop]))
        architecture = str(reader.fields["general.architecture"].contents())
        context = int(reader.fields[f"{architecture}.context_length"].contents())
        system = system_text(target.config, target.folder, root)
        disk.write_text(staged / MODELFILE, modelfile(path.name, go_template, stops, target.config, system, context))
        routes.append(parity.route_of_ollama(vocabulary, go_template, stops, text_ids))
    version = str(llama_cpp().__version__) if text_ids else None
    loss = _losses(files, path, kind, encoder, target.config, root)
    return {"tensors": tensors, "largest_error": largest_error, "llama_cpp": version, "loss": loss}, routes


def _losses(
    files: ModelFiles, path: Path, kind: str, encoder: Encoder, config: Config, root: Path
) -> dict[str, Any] | None:
    """The held-out loss of the weights and of the GGUF file in llama.cpp; None if llama.cpp cannot be used.

    Raises ModelError if a file that is not quantised has another loss than its weights.
    """
    if not has_llama_cpp():  # before the rows are encoded
        return None
    sample = verify.held_out_sample(encoder, config, root, int(files.config.get("vocab_size", 1 << 17)))
    logits = gguf.logits(path, [row.input_ids for row in sample.rows])
    if logits is None:
        return None
    loss = sample.loss([torch.from_numpy(part) for part in logits])
    own = sample.loss(sample.logits(verify.open_streamed(files, trust_remote_code=config.model.trust_remote_code)))
    if kind in ("f16", "bf16", "f32") and not abs(loss - own) <= verify.LOSS_LIMIT * max(1.0, own):
        what = f"llama.cpp computes another model from {path.name}: its held-out loss is {loss:.4f}, ours {own:.4f}"
        fix = "nothing was exported; with --converter try a newer llama.cpp, else report this"
        raise ModelError(what, where=sample.source, fix=fix)
    rows = {"held_out": sample.source, "held_out_rows": len(sample.rows), "held_out_of": sample.rows_in_source}
    return {**rows, "model": own, "llama_cpp": loss}


def _vocabulary(files: ModelFiles, encoder: Encoder, config: Config) -> Vocabulary:
    """The tokenizer for llama.cpp: first the end token that ends answers in training, begin tokens as in training."""
    tokenizer = load_tokenizer(files, trust_remote_code=config.model.trust_remote_code)
    labels = [row.labels for row in map(encoder.encode, GOLDEN_ROWS) if row.dropped is None]
    last_two = [row[at] for at in (-1, -2) for row in labels if len(row) >= -at]
    ends = [token for token in (*last_two, *sorted(encoder.stops.ids)) if token in encoder.stops.ids]
    begin = [tokenizer.bos_token_id]  # for llama.cpp to put first only where the tokenizer does, not just the template
    adds_bos = encoder.prompt(GOLDEN_ROWS[0])[:1] == begin and tokenizer.encode("x")[:1] == begin
    texts = [row["messages"][0]["content"] for row in GOLDEN_ROWS]
    rows = int(files.config["vocab_size"])
    return gguf.vocabulary_of_tokenizer(tokenizer, rows, list(dict.fromkeys(ends)), adds_bos=adds_bos, texts=texts)


# --- Ollama's Modelfile


def modelfile(
    weights: str, template: GoTemplate, stops: list[str], config: Config, system: str | None, context: int
) -> str:
    """The Modelfile for the GGUF file `weights`. context: tokens that the model can see. Raises ModelError for a text
    that a Modelfile cannot hold.
    """

    def block(text: str) -> str:
        if '"""' in text:
            raise ModelError('a Modelfile cannot hold a text with """ in it', fix="--format gguf")
        return f'"""{text}"""'

    def quoted(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'

    answers = config.generation
    context = min(context, max(4096, config.model.max_seq_len + answers.max_new_tokens))
    parameters: dict[str, float] = {
        "num_ctx": context,
        "num_predict": context,  # an answer ends at a stop text: max_new_tokens, for evaluation, would cut it
        "seed": answers.seed,
        "repeat_penalty": answers.repetition_penalty,
        "temperature": answers.temperature if answers.do_sample else 0,  # 0 is greedy
        **({"top_p": answers.top_p, "top_k": answers.top_k} if answers.do_sample else {}),
    }
    lines = [
        f"FROM ./{weights}",
        f"TEMPLATE {block(template.text())}",
        *(f"PARAMETER stop {quoted(stop)}" for stop in stops),
        *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
        *([f"SYSTEM {block(system)}"] if system else []),
    ]
    return "\n".join(lines) + "\n"
