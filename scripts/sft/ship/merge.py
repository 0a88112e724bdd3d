"""Where a model is written to: may it be written, is there room?"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files as disk
from sft import runs
from sft.config.schema import Config, ModelSection
from sft.errors import EnvironmentProblem, ModelError, RunError
from sft.model import adapters, hub
from sft.model.files import INDEX, ModelFiles, read_config, tensors
from sft.ship import delta
from sft.ship import verify as agreement
from sft.ship import verify as sample
from sft.ship.delta import HEAD

if TYPE_CHECKING:
    from sft.chat.template import ChatTemplate
    from sft.config.schema import Config


def need(out: Path, size: int, what: str) -> None:
    """Raises EnvironmentProblem unless `out` can be made, on a disk with `size` bytes free and some to spare."""
    place = out.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "you may not write there" if place.is_dir() else "it is a file"
        raise EnvironmentProblem(f"{out} cannot be made in {place}: {why}", where="--out", fix="name another: --out")
    wanted, free = size + (64 << 20), shutil.disk_usage(place).free
    if wanted > free:
        raise EnvironmentProblem(
            f"{what} needs {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
            where=str(place),
            fix="make room there, take a smaller type (fp16, bf16, q8_0), or --out on another disk",
        )


log = logging.getLogger("sft.ship")
# A template of turns inside one of messages: up to its answer for a prompt, spaces at the end left to the answer.
_TURN = """{%- set turn = namespace(system='', user=none, assistant=none) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}{%- set turn.system = message['content'] -%}
{%- elif message['role'] == 'user' and turn.user is none -%}{%- set turn.user = message['content'] -%}
{%- elif message['role'] == 'assistant' and turn.assistant is none -%}{%- set turn.assistant = message['content'] -%}
{%- else -%}{{- raise_exception('the template takes one system, user and assistant text') -}}{%- endif -%}
{%- endfor -%}
{%- set system, user = turn.system, turn.user -%}
{%- set assistant = '\U000ffff2' if turn.assistant is none else turn.assistant -%}
{%- set text -%}SOURCE{%- endset -%}
{{- text.split('\U000ffff2')[0].rstrip(' ') if turn.assistant is none else text -}}"""
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


def dress(
    folder: Path,
    files: ModelFiles,
    config: Config,
    root: Path,
    dtype: str,
    *,
    beside: Path,
    settings: dict[str, Any] | None = None,
    grown: bool = False,
) -> None:
    """Puts everything but the weights into `folder`: the tokenizer files byte for byte, config.json with `dtype` (fp16,
    bf16, fp32) and `settings`, generation_config.json with every end token, the chat template, the run's config.

    beside: the adapter. grown: the vocabulary is the adapter's, so the tokenizer files are those that lie beside it.
    """
    own = grown and any((beside / name).is_file() for name in _TOKENIZER)
    if grown and not own:
        log.warning(f"the adapter has a larger vocabulary than {files.name}, and no tokenizer beside it")
    for name in _TOKENIZER:
        if ((beside if own else files.path) / name).is_file():
            shutil.copyfile((beside if own else files.path) / name, folder / name)
    if config.model.trust_remote_code:
        for code in files.path.glob("*.py"):
            shutil.copyfile(code, folder / code.name)
    kept = {key: value for key, value in files.config.items() if key != "torch_dtype"}
    _write(folder / "config.json", {**kept, "dtype": _DTYPES[dtype], **(settings or {})})
    _generation(folder, files, _template(folder, files, beside if own else files, config, root))
    for place in (beside, beside.parent):
        if (place / runs.RESOLVED).is_file():
            shutil.copyfile(place / runs.RESOLVED, folder / runs.RESOLVED)
            break


def _template(folder: Path, files: ModelFiles, source: ModelFiles | Path, config: Config, root: Path) -> list[int]:
    """Writes the chat template that the model was trained with; returns the ids of its end tokens."""
    from sft.chat.encode import encoder_for
    from sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source, trust_remote_code=config.model.trust_remote_code)
    encoder = encoder_for(config, tokenizer, files.kind, root)
    template = encoder.template
    (folder / "chat_template.jinja").write_text(for_all(template), encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.pop("chat_template", None) is not None:
            _write(folder / "tokenizer_config.json", settings)
    return sorted(encoder.stops.ids)


def for_all(template: ChatTemplate) -> str:
    """The template as one text that any library can use: options set in it, both variants of one that has two, and one
    of turns (system, user, assistant) told as one of messages.
    """
    source = template.source
    if template.style == "turn":
        source = _TURN.replace("SOURCE", source)
    elif template.tool_source is not None:
        source = "{% if tools %}" + template.tool_source + "{% else %}" + source + "{% endif %}"
    options = template.date_macro() + "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value} -%}}"
        for name, value in template.options.items()
    )
    return options + source


def _generation(folder: Path, files: ModelFiles, stops: list[int]) -> None:
    source = files.path / "generation_config.json"
    settings: dict[str, Any] = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    old = settings.get("eos_token_id", [])
    ends = sorted({*stops, *(old if isinstance(old, list) else [old])})
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    _write(folder / "generation_config.json", settings)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


REPORT = "merge.json"
FULL = "full precision"


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how well: adapter against merged (see Agreement), and the share of the adapted weights that
    changed.

    trained_on: the base's weights in training (nf4 or fp4 of a QLoRA run, else full precision). measured_on: those that
    `loss_adapter` was measured on: the base's stored weights, never the 4-bit ones.
    """

    out: str
    base: str
    adapter: str
    dtype: str
    tensors: int
    changed_share: float
    held_out: str
    held_out_rows: int
    held_out_of: int
    held_out_tokens: int
    trained_on: str
    measured_on: str
    loss_adapter: float
    loss_merged: float
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    bytes: int
    seconds: float


def _silent(done: int, total: int, name: str) -> None:
    """Progress that nobody watches."""


def merge(
    adapter: Path,
    out: Path,
    dtype: str,
    root: Path,
    on_progress: delta.Progress = _silent,
    *,
    base: str | None = None,
) -> MergeReport:
    """Merges the adapter in folder `adapter` into its base and writes the model to `out`, or leaves `out` as it was.

    dtype: fp16, bf16 or fp32. base: where the base is now, if not where the adapter's config says. Raises ModelError
    (no adapter, another base, a quantised base, nothing changed, the merge harms), EnvironmentProblem (disk), RunError
    (`out` is in the way).
    """
    started = time.monotonic()
    adapter, out = adapter.absolute(), out.absolute()
    _refuse_whole_model(adapter)
    record = adapters.base_of(adapter)
    config = config_of(adapter, record)
    files = find_base(config.model, base, adapter, root)
    _refuse_wrong(files, adapter, record)
    _refuse_target(out, adapter, files)
    disk.sweep(out.parent, out.name)
    shapes = {name: entry["shape"] for path in files.weights for name, entry in tensors(path).items()}
    tied = bool(files.config.get("tie_word_embeddings", True)) and HEAD not in shapes
    read = delta.read_changes(adapter, record["config"])
    follows = tied and record["config"].get("ensure_weight_tying") is True
    placed = delta.place(read, set(shapes), tied=tied, follows=follows)
    need(out, files.parameters * delta.BYTES[dtype], "the merged model")
    log.info(f"merging {adapter.name} into {files.name} ({files.size} parameters) as {dtype}")
    with disk.atomic_folder(out) as staged:
        tally = delta.write(files.weights, staged, placed, dtype, on_progress)
        _refuse_nothing(tally, dtype)
        index(files, staged)
        grown = _vocabulary(placed, shapes)
        settings: dict[str, Any] = {"vocab_size": grown} if grown else {}
        if HEAD in placed and HEAD not in shapes:
            settings["tie_word_embeddings"] = False
        dress(staged, files, config, root, dtype, beside=adapter, settings=settings, grown=bool(grown))
        found = verify(files, staged, config, adapter, dtype, root)
        report = _report(started, out, files, adapter, config, dtype, tally, found, staged)
        (staged / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def copy(source: Path, out: Path, dtype: str, config: Config, root: Path, on_progress: delta.Progress) -> Path:
    """Writes a full run's weights in `dtype` to `out`, with all that serving needs; returns `out`."""
    files = hub.find(config.model.model_copy(update={"name": str(source), "revision": None}), root)
    need(out, files.parameters * delta.BYTES[dtype], "the merged model")
    with disk.atomic_folder(out) as staged:
        delta.write(files.weights, staged, {}, dtype, on_progress)
        index(files, staged)
        dress(staged, files, config, root, dtype, beside=source)
    return out


def verify(
    files: ModelFiles, folder: Path, config: Config, adapter: Path, dtype: str, root: Path
) -> agreement.Agreement:
    """Adapter on its base against the merged weights in `folder`, on held-out rows. Raises ModelError."""
    from sft.chat.encode import encoder_for
    from sft.model.tokenizer import load_tokenizer

    merged = ModelFiles(folder, str(folder), None, read_config(folder, str(folder)), files.kind)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    encoder = encoder_for(config, tokenizer, files.kind, root)
    held_out = sample.take(encoder, config, root, int(merged.config.get("vocab_size", 1 << 17)))
    return agreement.compare(files, merged, config, adapter, dtype, held_out)


def _report(
    started: float,
    out: Path,
    files: ModelFiles,
    adapter: Path,
    config: Config,
    dtype: str,
    tally: delta.Tally,
    found: agreement.Agreement,
    staged: Path,
) -> MergeReport:
    return MergeReport(
        out=str(out),
        base=files.name,
        adapter=str(adapter),
        dtype=dtype,
        tensors=tally.tensors,
        changed_share=tally.changed / max(1, tally.numbers),
        held_out=found.source,
        held_out_rows=found.rows,
        held_out_of=found.of,
        held_out_tokens=found.tokens,
        trained_on=config.tuning.quant_type if config.tuning.mode == "qlora" else FULL,
        measured_on=FULL,
        loss_adapter=found.loss_adapter,
        loss_merged=found.loss_merged,
        max_logit_difference=found.largest,
        mean_kl=found.kl,
        top1_agreement=found.top1,
        bytes=sum(path.stat().st_size for path in staged.glob("*.safetensors")),
        seconds=round(time.monotonic() - started, 1),
    )


def _vocabulary(placed: dict[str, delta.Change], shapes: dict[str, list[int]]) -> int | None:
    """The number of tokens where the adapter brings an embedding of another size, else None."""
    grown = [
        change.whole.shape[0]
        for name, change in placed.items()
        if change.whole is not None and name in shapes and list(change.whole.shape) != shapes[name]
    ]
    return int(grown[0]) if grown else None


def config_of(adapter: Path, record: dict[str, Any]) -> Config:
    """The config that the adapter was trained with; where none lies beside it, its base alone under the defaults."""
    try:
        return runs.run_of_adapter(adapter)
    except RunError:
        if not record["name"]:
            raise
        log.warning(f"{adapter} has no {runs.RESOLVED} beside it: taking the base's own chat template")
        return Config(model=ModelSection(name=str(record["name"]), revision=record["revision"]))


def _refuse_whole_model(adapter: Path) -> None:
    if (adapter / adapters.CONFIG).is_file():
        return
    for whole in (adapter / "model", adapter):
        if (whole / "config.json").is_file():
            raise ModelError(
                f"{adapter.name} was trained in full mode: there is nothing to merge, its model is {whole}",
                where=str(whole),
                fix=f"use it as it is: --merged {whole}",
            )


def find_base(section: ModelSection, moved: str | None, adapter: Path, root: Path) -> ModelFiles:
    """The adapter's base, as `section` names it or where it is now. Raises ModelError, with how to name its place."""
    try:
        return hub.find(section.model_copy(update={"name": moved, "revision": None}) if moved else section, root)
    except ModelError as error:
        told = f"{adapter.name} was trained on {section.name}; where that is now: --set model.name=PLACE"
        error.fix = f"{error.fix}\n         {told}" if error.fix else told
        raise


def _refuse_wrong(files: ModelFiles, adapter: Path, record: dict[str, Any]) -> None:
    if files.quantised:
        raise ModelError(
            f"{files.name} is stored quantised ({files.quantised}): its steps are larger than most of what the adapter"
            " adds, so merging into it would round the adapter away",
            where="model.name",
            fix="merge into the full-precision model it was made from",
        )
    if record["fingerprint"] and record["fingerprint"] != files.fingerprint():
        raise adapters.other_base(adapter, str(record["name"]), files.name, "the weights differ")


def _refuse_target(out: Path, adapter: Path, files: ModelFiles) -> None:
    """`out` may be new, empty, or an earlier merge; nothing else is ever replaced."""
    taken = out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / REPORT).is_file()))
    resolved = out.resolve()
    if taken or resolved in (adapter.resolve(), files.path.resolve()) or resolved in adapter.resolve().parents:
        raise RunError(f"{out} is in the way: it is no merged model", where=str(out), fix="name another folder: --out")


def _refuse_nothing(tally: delta.Tally, dtype: str) -> None:
    if not tally.changed:
        raise ModelError(
            f"the merge changed nothing: none of {tally.numbers} adapted weights differs from the base's in {dtype}",
            fix="the adapter is empty (was it trained?), or too small for this type: try --dtype fp32",
        )


def index(files: ModelFiles, staged: Path) -> None:
    """The index of a model in several files, as they were written."""
    if not (files.path / INDEX).is_file():
        return
    written = {
        name: (path.name, entry)
        for path in sorted(staged.glob("*.safetensors"))
        for name, entry in tensors(path).items()
    }
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, entry in written.values())
    told = {"metadata": {"total_size": size}, "weight_map": {name: path for name, (path, _) in written.items()}}
    (staged / INDEX).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
