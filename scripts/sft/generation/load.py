"""The system text that a tuned model was trained with, so that chat and batches give it again without being told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sft import runs
from sft.chat.encode import Encoder, encoder_for
from sft.config.load import load, resolve_path
from sft.config.schema import Config, GenerationSection
from sft.data import rows as records
from sft.data import store
from sft.errors import ModelError, RunError, SftError
from sft.generation import engine
from sft.generation.engine import say_lost, truncate_prompt
from sft.model import adapters, hardware, hub
from sft.model import load as model_load
from sft.model.tokenizer import load_tokenizer
from sft.runs import RESOLVED, Run
from sft.step import attention

SERVING = "serving.json"
SIXTEEN_BIT = 2.4  # bytes a parameter: 16-bit weights and a fifth for keys, values and activations
LowMemory = Literal["4bit", "cpu"]


def expected(config: Config, folder: Path | None, root: Path) -> str | None:
    """The system text that answers expect: the one that all training rows shared, else `data.system_prompt`, else None.

    Read from serving.json beside the adapter or model; where there is none, from the training rows if they are here.
    """
    for place in (folder, folder.parent if folder else None):
        path = place / SERVING if place else None
        if path is not None and path.is_file():
            try:
                said = json.loads(path.read_text(encoding="utf-8")).get("system")
            except (ValueError, AttributeError):
                raise ModelError(f"{path} is not a JSON object", fix="delete it, or train again") from None
            return said if isinstance(said, str) and said else config.data.system_prompt
    if folder is None:
        return config.data.system_prompt
    try:
        shared = shared_by(store.iter_rows(store.paths(config.data, root).train))
    except (SftError, OSError):
        shared = None
    return shared or config.data.system_prompt


def shared_by(rows: Iterable[records.Row]) -> str | None:
    """The system text that every one of the rows has, letter by letter; None where they differ or have none."""
    found: str | None = None
    for row in rows:
        if records.is_rendered(row):
            return None
        turns = records.messages(row)
        text = turns[0].get("content") if turns and turns[0]["role"] == "system" else None
        if not isinstance(text, str) or (found is not None and text != found):
            return None
        found = text
    return found


log = logging.getLogger("sft.generation")


@dataclass(frozen=True)
class Target:
    """What to open. config: the run's own, with today's `eval` and `generation` settings.

    adapter, merged: the tuned side; neither for a base alone. run: the run that it belongs to, if there is one.
    """

    config: Config
    run: Run | None
    adapter: Path | None = None
    merged: Path | None = None

    @property
    def tuned(self) -> bool:
        return self.adapter is not None or self.merged is not None

    @property
    def folder(self) -> Path | None:
        """Where the tuned side lies."""
        return self.adapter or self.merged

    @property
    def name(self) -> str:
        """What results are filed under."""
        if self.run is not None:
            return self.run.name
        return self.folder.name if self.folder is not None else "base"


def resolve_model(
    config: Path,
    sets: Sequence[str],
    *,
    adapters: Path | None = None,
    merged: Path | None = None,
    base: bool = False,
    is_default: bool = False,
    root: Path,
) -> Target:
    """Nothing named: the newest run. `base` alone: the newest run's base, or that of `config` before any run.

    config: the file of --config; its `eval` and `generation` win over the run's where it was named by hand or is the
    run's own (same train.output_dir); `sets` win over all. Raises RunError, ModelError, ConfigError.
    """
    if adapters is not None and merged is not None:
        raise ModelError("--adapters and --merged name two models", fix="give one of them")
    if adapters is not None:
        return _named(config, sets, _adapter_folder(adapters), "adapter", is_default, root)
    if merged is not None:
        return _named(config, sets, _model_folder(merged), "merged", is_default, root)
    if not (root / "outputs" / "last").is_dir():
        if base:
            return Target(load(config, sets, root=root).config, None)
        raise RunError(
            "there is no trained model yet", where=str(root / "outputs" / "last"), fix="make train, or --base"
        )
    run = runs.last_run(root)
    settings = _settings(config, sets, run.folder, is_default, root)
    if run.adapter_dir.is_dir():
        return Target(settings, run, adapter=run.adapter_dir)
    if run.model_dir.is_dir():
        return Target(settings, run, merged=run.model_dir)
    if base:
        return Target(settings, run)
    raise RunError(
        f"the run {run.name} left neither an adapter nor a model", where=str(run.folder), fix="make train, or --base"
    )


def _named(config: Path, sets: Sequence[str], folder: Path, side: str, is_default: bool, root: Path) -> Target:
    home = next((place for place in (folder, folder.parent) if (place / RESOLVED).is_file()), None)
    if home is None:
        log.warning("%s has no %s: its base and template are taken from %s", folder, RESOLVED, config)
        return Target(load(config, sets, root=root).config, None, **{side: folder})
    settings = _settings(config, sets, home, is_default, root)
    return Target(settings, _run_of(folder, settings, root), **{side: folder})


def _run_of(folder: Path, settings: Config, root: Path) -> Run | None:
    """The run that left its adapter or its whole model in `folder`; None for a copy, or a folder from elsewhere.

    Runs of one `train.output_dir` are numbered, so the run has the folder's name (outputs/X-2 left adapters/X-2).
    """
    here = resolve_path(root, settings.train.output_dir)
    run = runs.at(folder.parent if folder.name == "model" else here.with_name(folder.name), root)
    own = folder in (run.adapter_dir.resolve(), run.model_dir.resolve())
    return run if own and run.folder.is_dir() else None


def _settings(config: Path, sets: Sequence[str], home: Path, is_default: bool, root: Path) -> Config:
    """The run's resolved config under --set, with the sections about answers taken from --config where it speaks."""
    resolved = load(home / RESOLVED, sets, root=root).config
    if is_default and not config.is_file():
        return resolved
    asked = load(config, sets, root=root)
    same = _stem(asked.config.train.output_dir, home.name) or _stem(
        asked.config.train.output_dir, Path(resolved.train.output_dir).name
    )
    if is_default and not same:
        return resolved
    update = {section: getattr(asked.config, section) for section in ("eval", "generation") if asked.is_set(section)}
    return resolved.model_copy(update=update)


def _stem(output_dir: str, run: str) -> bool:
    name = Path(output_dir).name
    return run == name or (run.startswith(name + "-") and run[len(name) + 1 :].isdigit())


def _adapter_folder(path: Path) -> Path:
    folder = path.expanduser().resolve()
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"there is no adapter in {path}" if folder.is_dir() else f"the adapter folder {path} is not there",
            where="--adapters",
            fix="name a folder that train wrote, such as adapters/last; make train makes one",
        )
    return folder


def _model_folder(path: Path) -> Path:
    folder = path.expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"there is no model in {path}" if folder.is_dir() else f"the model folder {path} is not there",
            where="--merged",
            fix="name a folder that merge_lora wrote: make merge",
        )
    return folder


Row = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer, with the encoder that it was trained with."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    kind: engine.Kind
    device: str
    name: str

    @property
    def adapted(self) -> bool:
        """Whether an adapter is on it that can be switched off."""
        return hasattr(self.model, "disable_adapter")

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The base's own answers for the time of the block: the adapter is switched off."""
        if not self.adapted:
            yield
            return
        with self.model.disable_adapter():
            yield

    def prompt(self, row: Row | list[Message], settings: GenerationSection) -> tuple[list[int], int]:
        """The prompt's ids for a row or a conversation, and how many of its oldest turns did not fit the model."""
        return truncate_prompt(self.encoder, row, engine.prompt_room(self.model, settings, self.kind))

    def stream(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, engine.Answer]:
        """The answer to a conversation in pieces; another attempt draws with another seed."""
        ids, turns = self.prompt(messages, settings)
        if turns:
            log.warning("the conversation is too long for the model: its oldest %d turns were left out", turns)
        seeded = settings.model_copy(update={"seed": settings.seed + attempt})
        return engine.stream(self.model, self.tokenizer, ids, seeded, self.encoder.stops, kind=self.kind)

    def stream_base(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, engine.Answer]:
        """The same from the base alone."""
        with self.base_only():
            return (yield from self.stream(messages, settings, attempt))


def answer_all(
    served: LoadedModel,
    rows: Sequence[Row | None],
    config: Config,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[engine.Answer | None]:
    """An answer to each row (as the encoder takes them), None for None."""
    asked = {index: served.prompt(row, config.generation) for index, row in enumerate(rows) if row is not None}
    say_lost([lost for _, lost in asked.values()], "turns")
    answers = engine.generate(
        served.model,
        served.tokenizer,
        [ids for ids, _ in asked.values()],
        config.generation,
        served.encoder.stops,
        batch_size=config.eval.batch_size,
        kind=served.kind,
        on_progress=on_progress,
    )
    say_lost([answer.truncated for answer in answers], "tokens")
    found = dict(zip(asked, answers, strict=True))
    return [found.get(index) for index in range(len(rows))]


def open_model(
    config: Config,
    *,
    adapter: Path | None = None,
    merged: Path | None = None,
    root: Path,
    dtype: torch.dtype | None = None,
    low_memory: LowMemory | None = None,
) -> LoadedModel:
    """The tuned model (`adapter` on its base, or the whole weights in `merged`), or the base when neither is given.

    config: the run's resolved one. A 4-bit run is opened in 4 bits, its base alone too; merged weights as they are.
    dtype: of the weights; None: see `weight_dtype`.
    low_memory: where 16-bit weights do not fit into the device's free memory, load them in 4 bits ("4bit") or on the
    CPU ("cpu"), and warn. None is "4bit" for merged weights, which may belong to a run that was trained in 4 bits;
    other weights are then loaded as they were trained.
    Raises ModelError (no model, the adapter is another base's), TemplateError, EnvironmentProblem.
    """
    card = hardware.probe()
    section = config.model if merged is None else config.model.model_copy(update={"name": str(merged.absolute())})
    device = model_load.placement(section.device_map, card.device)
    files = hub.find(section, root, weights=True)
    tokenizer = load_tokenizer(_tokenizer_source(files, adapter), trust_remote_code=section.trust_remote_code)
    encoder = encoder_for(config, tokenizer, files.kind, root, eos_ids=_end_ids(files.path))
    tuning, quantise = config.tuning, merged is None and config.tuning.mode == "qlora"
    low_memory = low_memory or ("4bit" if merged is not None else None)
    free = card.free_bytes if device.startswith(card.device) else hardware.memory()[1]
    if low_memory and not quantise and SIXTEEN_BIT * files.parameters > free:
        if low_memory == "4bit":
            log.warning(
                "%s does not fit into the free memory in 16 bits: it is loaded in 4 bits, which changes its answers"
                " a little (--set model.device_map=cpu keeps 16 bits)",
                files.name,
            )
            tuning, quantise = tuning.model_copy(update={"mode": "qlora"}), True
        elif device != "cpu":
            log.warning("%s does not fit into the GPU's free memory in 16 bits: it is loaded on the CPU", files.name)
            section, device = section.model_copy(update={"device_map": "cpu"}), "cpu"
            free = hardware.memory()[1]
    model: Any = model_load.load_base(
        files,
        section,
        tuning,
        dtype or weight_dtype(config, card, device, 0 if quantise else 4 * files.parameters, free),
        device=device,
        train=False,
        attention=attention.implementation(device, files.config) or attention.fallback(files.config),
        quantise=quantise,
    )
    if adapter is not None:
        model = adapters.load(model, adapter)
    return LoadedModel(model.eval(), tokenizer, encoder, files.kind, device, str(adapter or merged or files.name))


def weight_dtype(config: Config, card: hardware.Hardware, device: str, bytes_in_fp32: int, free: int) -> torch.dtype:
    """The run's 16-bit type on a GPU that has it; on the CPU fp32, or bf16 where fp32 would not fit.

    bytes_in_fp32: of the weights; 0 where they are quantised. free: the device's free memory in bytes.
    """
    if device.startswith("cuda"):
        if config.train.bf16 is False and config.train.fp16 is False:
            return torch.float32
        return torch.float16 if config.train.fp16 is True or not card.bf16 else torch.bfloat16
    return torch.float32 if bytes_in_fp32 < 0.6 * free else torch.bfloat16


def _end_ids(folder: Path) -> list[int]:
    """The end tokens that the model's generation_config.json names: a base may end its answers with others."""
    try:
        said = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [int(token) for token in (said if isinstance(said, list) else [said]) if token is not None]


def _tokenizer_source(files: Any, adapter: Path | None) -> Any:
    saved = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    return adapter if saved else files
