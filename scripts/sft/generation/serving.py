"""Opens what a run made, as the run made it: base, adapter, tokenizer, template; nothing is restated."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.chat.encode import Encoder, encoder_for
from sft.config.schema import Config, GenerationSection
from sft.generation import engine, streaming
from sft.generation.room import fitted, say_lost
from sft.model import adapters, hardware, hub, loading
from sft.model.tokenizer import load_tokenizer
from sft.step import attention

log = logging.getLogger("sft.generation")
Row = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Served:
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
        return fitted(self.encoder, row, engine.prompt_room(self.model, settings, self.kind))

    def stream(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, engine.Answer]:
        """The answer to a conversation in pieces; another attempt draws with another seed."""
        ids, turns = self.prompt(messages, settings)
        if turns:
            log.warning("the conversation is too long for the model: its oldest %d turns were left out", turns)
        seeded = settings.model_copy(update={"seed": settings.seed + attempt})
        return streaming.stream(self.model, self.tokenizer, ids, seeded, self.encoder.stops, kind=self.kind)

    def stream_base(
        self, messages: list[Message], settings: GenerationSection, attempt: int = 0
    ) -> Generator[str, None, engine.Answer]:
        """The same from the base alone."""
        with self.base_only():
            return (yield from self.stream(messages, settings, attempt))


def answer_all(
    served: Served,
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
    config: Config, *, adapter: Path | None = None, merged: Path | None = None, root: Path, squeeze: bool = False
) -> Served:
    """The tuned model (`adapter` on its base, or the whole weights in `merged`), or the base when neither is given.

    config: the run's resolved one. A 4-bit run is served in 4 bits, its base alone too; merged weights as they are.
    squeeze: 4 bits too where 16-bit weights would not fit into the free memory, which is said.
    Raises ModelError (not found, the adapter is another base's), TemplateError, EnvironmentProblem.
    """
    card = hardware.probe()
    section = config.model if merged is None else config.model.model_copy(update={"name": str(merged.absolute())})
    device = loading.placement(section.device_map, card.device)
    files = hub.find(section, root, weights=True)
    tokenizer = load_tokenizer(_tokenizer_source(files, adapter), trust_remote_code=section.trust_remote_code)
    encoder = encoder_for(config, tokenizer, files.kind, root, eos_ids=_end_ids(files.path))
    quantise = merged is None and config.tuning.mode == "qlora"
    if squeeze and not quantise and 2.4 * files.parameters > card.free_bytes:
        log.warning("%s does not fit into the free memory in 16 bits: it is loaded in 4 bits", files.name)
        four_bits = config.tuning.model_copy(update={"mode": "qlora"})
        quantise, config = True, config.model_copy(update={"tuning": four_bits})
    dtype = weight_dtype(config, card, device, files.parameters)
    wanted = attention.implementation(device, files.config) or attention.fallback(files.config)
    model: Any = loading.load_base(
        files,
        section,
        config.tuning,
        dtype,
        device=device,
        train=False,
        attention=wanted,
        quantise=quantise,
    )
    if adapter is not None:
        model = adapters.load(model, adapter)
    return Served(model.eval(), tokenizer, encoder, files.kind, device, str(adapter or merged or files.name))


def weight_dtype(config: Config, card: hardware.Hardware, device: str, parameters: int) -> torch.dtype:
    """The run's 16-bit type on a GPU that has it; on the CPU fp32, or bf16 where fp32 would not fit into memory."""
    if device.startswith("cuda"):
        if config.train.bf16 is False and config.train.fp16 is False:
            return torch.float32
        return torch.float16 if config.train.fp16 is True or not card.bf16 else torch.bfloat16
    small = 4 * parameters < 0.6 * card.free_bytes or config.tuning.mode == "qlora"
    return torch.float32 if small else torch.bfloat16


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
