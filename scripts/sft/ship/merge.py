"""Merges an adapter into its full-precision base, checks the result, and leaves a folder that any library can load.

The base's own files are read tensor by tensor, never the 4-bit weights of training. Before the folder takes its place:
did the merge change anything, and do adapter and merged model give the same logits.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft import files as disk
from sft import runs
from sft.config.schema import Config, ModelSection
from sft.errors import EnvironmentProblem, ModelError, RunError
from sft.model import bases, hub
from sft.model.files import INDEX, ModelFiles, tensors
from sft.ship import agreement, outfit
from sft.ship import tensors as streams

log = logging.getLogger("sft.ship")
REPORT = "merge.json"


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how well: the largest difference of logits, the mean KL divergence (nats a token) and the
    share of equal first choices, adapter against merged (None where memory was too small to compare), and the share of
    the adapted weights that changed.
    """

    out: str
    base: str
    adapter: str
    dtype: str
    tensors: int
    changed_share: float
    max_logit_difference: float | None
    mean_kl: float | None
    top1_agreement: float | None
    bytes: int
    seconds: float


def _silent(done: int, total: int, name: str) -> None:
    """Progress that nobody watches."""


def merge(
    adapter: Path,
    out: Path,
    dtype: str,
    root: Path,
    on_progress: streams.Progress = _silent,
    *,
    base: str | None = None,
) -> MergeReport:
    """Merges the adapter in folder `adapter` into its base and writes the model to `out`, or leaves `out` as it was.

    dtype: fp16, bf16 or fp32. base: where the base is now, if not where the adapter's config says. Raises ModelError
    (no adapter, another base, a quantised base, nothing changed, logits differ), EnvironmentProblem (disk), RunError
    (`out` is in the way).
    """
    started = time.monotonic()
    adapter, out = adapter.absolute(), out.absolute()
    _refuse_whole_model(adapter)
    record = bases.base_of(adapter)
    config = config_of(adapter, record)
    section = config.model.model_copy(update={"name": base, "revision": None}) if base else config.model
    files = hub.find(section, root)
    _refuse_wrong(files, adapter, record)
    _refuse_target(out, adapter, files)
    _room(out, files, dtype)
    changes = streams.place(
        streams.read_changes(adapter, record["config"]),
        {name for path in files.weights for name in tensors(path)},
        tied=bool(files.config.get("tie_word_embeddings", True)),
    )
    log.info(f"merging {adapter.name} into {files.name} ({files.size} parameters) as {dtype}")
    with disk.atomic_folder(out) as staged:
        tally = streams.write(files.weights, staged, changes, record["config"], dtype, on_progress)
        _refuse_nothing(tally, dtype)
        _index(files, staged)
        outfit.dress(staged, files, config, root, streams.dtype_of(dtype), beside=adapter)
        found = agreement.compare(files, config, adapter, staged, dtype)
        report = MergeReport(
            out=str(out),
            base=files.name,
            adapter=str(adapter),
            dtype=dtype,
            tensors=tally.tensors,
            changed_share=tally.changed / tally.numbers,
            max_logit_difference=found and found[0],
            mean_kl=found and found[1],
            top1_agreement=found and found[2],
            bytes=sum(path.stat().st_size for path in staged.glob("*.safetensors")),
            seconds=round(time.monotonic() - started, 1),
        )
        (staged / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


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
    if (adapter / bases.CONFIG).is_file():
        return
    for place in (adapter / "model", adapter):
        if (place / "config.json").is_file():
            raise ModelError(
                f"{adapter.name} was trained in full mode: there is nothing to merge, its model is {place}",
                where=str(place),
                mend=f"use it as it is: --merged {place}",
            )


def _refuse_wrong(files: ModelFiles, adapter: Path, record: dict[str, Any]) -> None:
    if files.quantised:
        raise ModelError(
            f"{files.name} is stored quantised ({files.quantised}); merging into it would round the adapter away",
            where="model.name",
            mend="merge into the full-precision model it was made from",
        )
    if record["fingerprint"] and record["fingerprint"] != files.fingerprint():
        raise bases.other_base(adapter, str(record["name"]), files.name, "the weights differ")


def _refuse_target(out: Path, adapter: Path, files: ModelFiles) -> None:
    """`out` may be new, empty, or an earlier merge; nothing else is ever replaced."""
    taken = out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / REPORT).is_file()))
    resolved = out.resolve()
    if taken or resolved in (adapter.resolve(), files.path.resolve()) or resolved in adapter.resolve().parents:
        raise RunError(f"{out} is in the way: it is no merged model", where=str(out), mend="name another folder: --out")


def _room(out: Path, files: ModelFiles, dtype: str) -> None:
    place = out.parent
    while not place.exists():
        place = place.parent
    need, free = files.parameters * streams.BYTES[dtype] + 64 * 2**20, shutil.disk_usage(place).free
    if need > free:
        raise EnvironmentProblem(
            f"the merged model needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
            where=str(place),
            mend="make room there, or --dtype bf16 instead of fp32, or --out on another disk",
        )


def _refuse_nothing(tally: streams.Tally, dtype: str) -> None:
    if not tally.changed:
        raise ModelError(
            f"the merge changed nothing: none of {tally.numbers} adapted weights differs from the base's in {dtype}",
            mend="the adapter is empty (was it trained?), or too small for this type: try --dtype fp32",
        )


def _index(files: ModelFiles, staged: Path) -> None:
    """The index of a model in several files, with the new total size."""
    if not (files.path / INDEX).is_file():
        return
    index = json.loads((files.path / INDEX).read_text(encoding="utf-8"))
    written = [entry for path in staged.glob("*.safetensors") for entry in tensors(path).values()]
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in written)
    index["metadata"] = {**index.get("metadata", {}), "total_size": size}
    (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
