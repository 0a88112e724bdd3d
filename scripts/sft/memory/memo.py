"""Traces that were made before: kept under `.cache/planner/traces`, by config, model description, code and versions."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.config.schema import Config
from sft.errors import SftError

if TYPE_CHECKING:
    from sft.memory.trace import Traced, Tracer

FOLDER = ".cache/planner/traces"
OF_TRAIN = {
    "gradient_checkpointing", "logits", "logits_tile", "max_grad_norm", "label_smoothing", "bf16", "fp16",
    "weight_decay", "activation_offload",
}  # fmt: skip
FACTS = ("kind", "apart", "parameters", "experts", "largest", "widest", "standing", "moments")
NUMBERS = (1, 4)  # bytes of a number in an optimizer's state
log = logging.getLogger("sft.memory")


def moments(optim: str, device: str) -> tuple[int, int] | None:
    """(how many, bytes of each) numbers an optimizer keeps of a trained weight on the device; None where it is traced.

    8-bit optimizers keep a byte a moment, paged ones keep their state in the machine's memory, SGD and Adafactor about
    none. On a CPU AdamW's step allocates, so it is followed itself.
    """
    if device == "cpu" and optim in ("auto", "adamw_torch"):
        return None
    none = optim.startswith("paged") or "sgd" in optim or "adafactor" in optim
    return 0 if none else 2, 1 if "8bit" in optim else 4


class Traces:
    """As a Tracer, but a trace that is kept is not made again, and the model is drawn when the first one is missing.

    Traces with their optimizer's state, wherever it is. root: the project's, None to keep nothing. Raises ModelError as
    a Tracer does.
    """

    def __init__(self, config: Config, description: Mapping[str, Any], *, device: str, root: Path | None) -> None:
        self.config, self.description, self.device = config, description, device
        self.key = self._key()
        self.path = None if root is None else root / FOLDER / f"{self.key}.json"
        self.kept = {} if self.path is None else files.read_json(self.path)
        self._made: list[Tracer] = []

    def beside(self, other: Traces) -> Traces:
        """This, on the drawn model and the traces of another with the same key."""
        self.kept, self._made = other.kept, other._made
        return self

    @property
    def standing(self) -> int:
        """Bytes on the device before any pass: no phase takes less."""
        return int(self._fact("standing")) + self._state()

    @property
    def kind(self) -> Any:
        """`causal` or `seq2seq`."""
        return self._fact("kind")

    @property
    def apart(self) -> bool:
        """Whether rows are packed without padding."""
        return bool(self._fact("apart"))

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return int(self._fact("parameters"))

    @property
    def sixteen_bit_experts(self) -> int:
        """Weights of experts that stay in 16 bit where linear layers are 4-bit, because they are no linear layers."""
        return int(self._fact("experts"))

    @property
    def largest_weight(self) -> int:
        """Numbers of the base's largest tensor."""
        return int(self._fact("largest"))

    @property
    def widest_layer(self) -> int:
        """Numbers of its largest linear layer but the head."""
        return int(self._fact("widest"))

    def step(self, lengths: Sequence[int], *, waiting: bool) -> Traced:
        """See `Tracer.step`."""
        return self._trace(f"step {list(lengths)} {waiting}", lambda t: t.step(lengths, waiting=waiting))

    def evaluation(self, lengths: Sequence[int]) -> Traced:
        """See `Tracer.evaluation`."""
        return self._trace(f"evaluation {list(lengths)}", lambda t: t.evaluation(lengths))

    def generation(self, rows: int, prompt: int, answer: int) -> Traced:
        """See `Tracer.generation`."""
        return self._trace(f"generation {rows} {prompt} {answer}", lambda t: t.generation(rows, prompt, answer))

    def _trace(self, name: str, make: Callable[[Tracer], Traced]) -> Traced:
        from sft.memory.trace import Traced

        if name not in self.kept:
            self._keep(name, vars(make(self._drawn())))
        found, state = Traced(**self.kept[name]), self._state()
        parts = {part: size + state if part == "optimizer" else size for part, size in found.parts.items()}
        return Traced({part: size for part, size in parts.items() if size}, found.peak + state, found.standing + state)

    def _state(self) -> int:
        """Bytes of optimizer state that a trace is without."""
        kept = moments(self.config.train.optim, self.device)
        return 0 if kept is None else kept[0] * int(self._fact("moments")[str(kept[1])])

    def _fact(self, name: str) -> Any:
        if name not in self.kept:
            tracer = self._drawn()
            for fact in FACTS:
                self._keep(fact, getattr(tracer, fact))
        return self.kept[name]

    def _drawn(self) -> Tracer:
        from sft.memory.trace import Tracer

        if not self._made:
            self._made.append(Tracer(self.config, self.description, device=self.device))
        return self._made[0]

    def _keep(self, name: str, value: Any) -> None:
        self.kept[name] = value
        if self.path is not None:
            try:
                files.write_json(self.path, self.kept)
            except (OSError, SftError) as error:
                log.debug("a trace could not be kept: %s", error)

    def _key(self) -> str:
        train = self.config.train.model_dump(include=OF_TRAIN)
        followed = moments(self.config.train.optim, self.device) is None
        known = [dict(self.description), self.config.tuning.model_dump(), train, followed, self.device, _code()]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:24]


@functools.cache
def _code() -> str:
    """What a trace depends on besides its inputs: our code of a step, and the libraries'."""
    rooms = Path(__file__).parents[1]
    sources = sorted(path for room in ("memory", "step", "model") for path in (rooms / room).glob("*.py"))
    said = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return said + "".join(version(name) for name in ("torch", "transformers", "peft"))
