"""Merges an adapter into its full-precision base, tensor by tensor on the disk, and writes all that serving needs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft import files as disk
from sft import runs
from sft.chat.template import ChatTemplate
from sft.config.schema import Config, ModelSection
from sft.errors import EnvironmentProblem, ModelError, RunError
from sft.generation.encoder import load_encoder
from sft.model import adapters, hub
from sft.model.files import INDEX, ModelFiles, tensors
from sft.model.tokenizer import NEW_TOKENS
from sft.ship import MERGE_REPORT, lora_delta, verify
from sft.ship.lora_delta import BYTES, HEAD, TORCH_DTYPE, Progress

log = logging.getLogger("sft.ship")
FULL_PRECISION = "full precision"
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt"
    " tokenizer.model spiece.model"
).split()
_TURN_AS_MESSAGES = Path(__file__).with_name("turn_as_messages.jinja")
_ANSWER_MARK = "\U000ffff2"  # a private character: where the answer goes in a prompt


@dataclass(frozen=True)
class MergeReport(verify.Comparison):
    """What was merged and how well: the content of merge.json.

    changed_share: of the adapter's numbers, those that differ from the base's in `dtype`. trained_on: the base's
    weights in training (nf4 or fp4 for QLoRA, else full precision). measured_on: the base's weights under the adapter
    in the comparison, always its stored ones.
    """

    out: str
    base: str
    adapter: str
    dtype: str
    tensors: int
    changed_share: float
    trained_on: str
    measured_on: str
    bytes: int
    seconds: float


def merge(
    adapter: Path,
    out: Path,
    dtype: str,
    root: Path,
    on_progress: Progress = lambda done, total: None,
    *,
    base: str | None = None,
) -> MergeReport:
    """Merges the adapter in folder `adapter` into its base and writes the model to `out`, or leaves `out` unchanged.

    dtype: fp16, bf16 or fp32. base: where the base is now, if not where the adapter's config says. Raises ModelError
    (no adapter, another base, a quantised base, nothing changed, merged and adapter differ), EnvironmentProblem (disk),
    RunError (`out` holds something else).
    """
    started = time.monotonic()
    adapter, out = adapter.absolute(), out.absolute()
    for model in (adapter / "model", adapter):
        if not (adapter / adapters.CONFIG).is_file() and (model / "config.json").is_file():
            reason = f"{adapter.name} was trained in full mode: there is nothing to merge, its model is {model}"
            raise ModelError(reason, where=str(model), fix=f"use it directly: --merged {model}")
    record = adapters.base_of(adapter)
    config = config_of(adapter, record)
    files = find_base(config.model, base, adapter, root)
    _check_inputs(adapter, out, files, record)
    shapes = {name: entry["shape"] for path in files.weights for name, entry in tensors(path).items()}
    tied = bool(files.config.get("tie_word_embeddings", True)) and HEAD not in shapes
    stays_tied = tied and record["config"].get("ensure_weight_tying") is True
    deltas = lora_delta.read_deltas(adapter, record["config"])
    deltas = lora_delta.rename_to_files(deltas, set(shapes), tied=tied, stays_tied=stays_tied)
    require_space(out, files.parameters * BYTES[dtype], "the merged model")
    newest = ", the newest adapter (another one: --run NAME)," if adapter.name == "last" else ""
    log.info(f"merging {adapter.resolve().name}{newest} into {files.name} ({files.size} parameters) as {dtype}")
    with disk.atomic_folder(out) as staged:
        counts = lora_delta.write_merged(files.weights, staged, deltas, dtype, on_progress)
        if not counts.changed:
            raise ModelError(
                f"the merge changed nothing: all {counts.numbers} adapted weights equal the base's in {dtype}",
                fix="the adapter is untrained, or its changes are too small for this type: try --dtype fp32",
            )
        _write_index(files, staged)
        settings = {"tie_word_embeddings": False} if HEAD in deltas and HEAD not in shapes else {}
        write_config_and_tokenizer(staged, files, config, root, dtype, source=adapter, settings=settings)
        compared = verify.verify_merge(files, staged, config, adapter, dtype, root)
        report = MergeReport(
            **asdict(compared),
            out=str(out),
            base=files.name,
            adapter=str(adapter.resolve()),  # adapters/last will be another one
            dtype=dtype,
            tensors=counts.tensors,
            changed_share=counts.changed / max(1, counts.numbers),
            trained_on=config.tuning.quant_type if config.tuning.mode == "qlora" else FULL_PRECISION,
            measured_on=FULL_PRECISION,
            bytes=sum(path.stat().st_size for path in staged.glob("*.safetensors")),
            seconds=round(time.monotonic() - started, 1),
        )
        disk.write_json(staged / MERGE_REPORT, asdict(report))
    return report


def convert_full_run(source: Path, out: Path, dtype: str, config: Config, root: Path, on_progress: Progress) -> None:
    """Writes a full run's weights in `dtype` to `out`, with config, tokenizer and template."""
    files = hub.find(config.model.model_copy(update={"name": str(source), "revision": None}), root)
    require_space(out, files.parameters * BYTES[dtype], "the converted model")
    with disk.atomic_folder(out) as staged:
        lora_delta.write_merged(files.weights, staged, {}, dtype, on_progress)
        _write_index(files, staged)
        write_config_and_tokenizer(staged, files, config, root, dtype, source=source)


def require_space(out: Path, size: int, what: str) -> None:
    """Raises EnvironmentProblem unless `out` can be created, on a disk with `size` bytes free and some to spare."""
    place = disk.existing(out.parent)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "it is not writable" if place.is_dir() else "it is a file"
        raise EnvironmentProblem(f"{out} cannot be created in {place}: {reason}", where="--out", fix="--out OTHER_DIR")
    fix = "free space there, use a smaller type (fp16, bf16, q8_0), or --out on another disk"
    disk.require_free(place, size + (64 << 20), what, fix=fix)


def require_replaceable(out: Path, report: str, what: str) -> None:
    """Raises RunError unless `out` is new, empty, or an earlier result (it has the file `report`)."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / report).is_file())):
        raise RunError(f"{out} exists and is not {what}; it was not replaced", where=str(out), fix="--out OTHER_DIR")


def config_of(adapter: Path, record: dict[str, Any]) -> Config:
    """The config that the adapter was trained with; if there is none beside it, its base under the defaults."""
    try:
        return runs.run_of_adapter(adapter)
    except RunError:
        if not record["name"]:
            raise
        log.warning(f"{adapter} has no {runs.RESOLVED} beside it: the base's own chat template is used")
        return Config(model=ModelSection(name=str(record["name"]), revision=record["revision"]))


def find_base(section: ModelSection, moved: str | None, adapter: Path, root: Path) -> ModelFiles:
    """The adapter's base, as `section` names it or where it is now. Raises ModelError, with how to name its place."""
    try:
        return hub.find(section.model_copy(update={"name": moved, "revision": None}) if moved else section, root)
    except ModelError as error:
        hint = f"if the base of {adapter.name} ({section.name}) has moved: --set model.name=NEW_FOLDER"
        error.fix = f"{error.fix}\n         {hint}" if error.fix else hint
        raise


def _check_inputs(adapter: Path, out: Path, files: ModelFiles, record: dict[str, Any]) -> None:
    """Raises ModelError for a base that is quantised or not the adapter's, RunError for an `out` that is in use."""
    if files.quantised:
        what = f"{files.name} is stored quantised ({files.quantised}); merging would round away most of what is added"
        fix = "merge into the full-precision model that it was quantised from: --set model.name=NAME"
        raise ModelError(what, where="model.name", fix=fix)
    if record["fingerprint"] and record["fingerprint"] != files.fingerprint():
        raise adapters.other_base(adapter, str(record["name"]), files.name, "the weights differ")
    require_replaceable(out, MERGE_REPORT, "a merged model")
    earlier = disk.read_json(out / MERGE_REPORT).get("adapter")
    if earlier and Path(earlier).resolve() != adapter.resolve():
        log.warning(f"{out} holds the merge of {Path(earlier).name}, which will be replaced (--out DIR keeps it)")
    resolved = out.resolve()
    if resolved in (adapter.resolve(), files.path.resolve()) or resolved in adapter.resolve().parents:
        raise RunError(f"{out} holds the adapter or the base", where=str(out), fix="--out OTHER_DIR")


# --- what is written besides the weights


def write_config_and_tokenizer(
    folder: Path,
    files: ModelFiles,
    config: Config,
    root: Path,
    dtype: str,
    *,
    source: Path,
    settings: dict[str, Any] | None = None,
) -> None:
    """Writes all but the weights to `folder`: the tokenizer files byte for byte, config.json with `dtype` (fp16, bf16,
    fp32) and `settings`, generation_config.json with every end token, the chat template, the run's config.

    source: the adapter or the full run's model.
    """
    for name in _TOKENIZER_FILES:
        if (files.path / name).is_file():
            shutil.copyfile(files.path / name, folder / name)
    if config.model.trust_remote_code:
        for code in files.path.glob("*.py"):
            shutil.copyfile(code, folder / code.name)
    unchanged = {key: value for key, value in files.config.items() if key not in ("torch_dtype", NEW_TOKENS)}
    disk.write_json(folder / "config.json", {**unchanged, "dtype": TORCH_DTYPE[dtype], **(settings or {})})
    encoder = load_encoder(config, root, files=files)
    disk.write_text(folder / "chat_template.jinja", portable_template(encoder.template))
    tokenizer_settings = disk.read_json(folder / "tokenizer_config.json")
    if tokenizer_settings.pop("chat_template", None) is not None:
        disk.write_json(folder / "tokenizer_config.json", tokenizer_settings)
    generation = disk.read_json(files.path / "generation_config.json")
    old_ends = generation.get("eos_token_id", [])
    if ends := sorted({*encoder.stops.ids, *(old_ends if isinstance(old_ends, list) else [old_ends])}):
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    disk.write_json(folder / "generation_config.json", generation)
    if place := next((place for place in (source, source.parent) if (place / runs.RESOLVED).is_file()), None):
        shutil.copyfile(place / runs.RESOLVED, folder / runs.RESOLVED)


def portable_template(template: ChatTemplate) -> str:
    """The template as one text over messages that any library can render: options and date set in it, tool variant and
    the plain one joined, a template over (system, user, assistant) rewritten over messages.
    """
    source = template.source
    if template.style == "turn":
        wrapper = _TURN_AS_MESSAGES.read_text(encoding="utf-8").rstrip("\n")
        source = wrapper.replace("ANSWER_GOES_HERE", _ANSWER_MARK).replace("SOURCE", source)
    elif template.tool_source is not None:
        source = "{% if tools %}" + template.tool_source + "{% else %}" + source + "{% endif %}"
    options = template.date_macro() + "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value} -%}}"
        for name, value in template.options.items()
    )
    return options + source


def _write_index(files: ModelFiles, staged: Path) -> None:
    """The index of a model in several files, as they were written."""
    if not (files.path / INDEX).is_file():
        return
    weight_map: dict[str, str] = {}
    size = 0
    for path in sorted(staged.glob("*.safetensors")):
        for name, entry in tensors(path).items():
            weight_map[name] = path.name
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    disk.write_json(staged / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
