"""What each phase of a run needs: training, evaluation, generation, saving, merging; GPU, RAM and disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sft.config.schema import Config
from sft.memory.devices import LIBRARIES, Device
from sft.memory.estimate import GIB
from sft.memory.memo import Traces
from sft.memory.slack import Slack
from sft.memory.trace import Traced

STANDING = ("weights in 4 bit", "embedding and head", "weights", "adapters", "optimizer")
BLOCK = 1 << 24  # numbers that a merge works on at a time (`ship.changes`)
WORK, PLAIN_WORK = (
    20,
    8,
)  # bytes a number that it needs for them, measured: of a layer that it changes, of another tensor


@dataclass(frozen=True)
class Phase:
    """Sizes in GiB. allocated: tensors on the device at the highest moment, parts their items; peak: with fragmentation
    and context. ram, disk: what is needed beside the device, None where nothing worth saying. note: what it is of.
    """

    allocated: float
    peak: float
    parts: dict[str, float] = field(default_factory=dict)
    ram: float | None = None
    disk: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "allocated_gib": round(self.allocated, 3),
            "peak_gib": round(self.peak, 3),
            "parts": {name: round(size, 4) for name, size in self.parts.items()},
            "ram_gib": None if self.ram is None else round(self.ram, 3),
            "disk_gib": None if self.disk is None else round(self.disk, 3),
            "note": self.note,
        }


def lengths(config: Config, traces: Traces) -> list[int]:
    """The rows of the largest micro-batch that the resolved config allows: at max_seq_len, the last one shorter."""
    train, length = config.train, config.model.max_seq_len
    a_row, tokens = length * (2 if traces.kind == "seq2seq" else 1), int(train.micro_batch_tokens)
    rows = max(1, min(tokens // a_row, int(train.effective_batch)))
    found, left = [length] * rows, tokens - rows * length
    if traces.apart and rows < int(train.effective_batch) and left > 1:
        found.append(min(left, length))
    return found


def training(config: Config, traces: Traces, slack: Slack) -> Phase:
    """A step at the largest micro-batch."""
    rows = lengths(config, traces)
    found = traces.step(rows, waiting=len(rows) < int(config.train.effective_batch))
    return _traced(found, slack, f"{sum(rows)} tokens at a time")


def every(config: Config, traces: Traces, slack: Slack, device: Device, trained: Phase) -> dict[str, Phase]:
    """All phases of the run, `trained` first."""
    found = {"training": trained}
    if config.train.eval_strategy != "no":
        rows = lengths(config, traces)
        found["evaluation"] = _traced(traces.evaluation(rows), slack, f"{sum(rows)} tokens at a time")
        if config.eval.train_sample:
            found["generation"] = _generation(config, traces, slack, device)
    found["saving"] = _saving(config, slack, trained, device)
    if config.tuning.mode != "full":
        found["merging"] = _merging(traces)
    return found


def _generation(config: Config, traces: Traces, slack: Slack, device: Device) -> Phase:
    """Answers side by side; as generation itself does, half as many where they do not fit."""
    prompt, answer = config.model.max_seq_len, config.generation.max_new_tokens

    def at(rows: int) -> Phase:
        note = f"{rows} answers side by side, prompts of {prompt} and answers of {answer} tokens"
        return _traced(traces.generation(rows, prompt, answer), slack, note)

    rows = min(config.eval.batch_size, config.eval.train_sample)
    if slack.peak(traces.standing / GIB) > device.gib:
        return at(1)
    high = at(rows)
    if high.peak <= device.gib or rows == 1:
        return high
    low = at(1)
    a_row = (high.peak - low.peak) / (rows - 1)
    while rows > 1 and low.peak + (rows - 1) * a_row > device.gib:
        rows //= 2
    return low if rows == 1 else at(rows)


def _saving(config: Config, slack: Slack, trained: Phase, device: Device) -> Phase:
    """A checkpoint: what is trained and the optimizer's state; kept ones, the best, a new one in the making, and what
    the run leaves at its end. From a GPU the weights are written from a copy in RAM; on a CPU from where they are.
    """
    parts = {name: trained.parts[name] for name in STANDING if name in trained.parts}
    weights = parts.get("adapters", 0.0) if config.tuning.mode != "full" else parts.get("weights", 0.0)
    one = weights + parts.get("optimizer", 0.0)
    kept = config.train.save_total_limit + (2 if config.train.load_best_model_at_end else 1)
    allocated = sum(parts.values())
    note = f"{kept} checkpoints of {one:.2f} GiB and the result"
    ram = LIBRARIES["cuda"] + weights if device.kind == "cuda" else None
    return Phase(allocated, slack.peak(allocated), parts, ram, kept * one + weights, note)


def _merging(traces: Traces) -> Phase:
    """Tensor by tensor from the base's 16-bit files: RAM of one's pages, and of a block that is worked on."""
    worked = ((traces.largest_weight, PLAIN_WORK), (traces.widest_layer, WORK))
    ram = LIBRARIES["cpu"] + max(2 * size + work * min(size, BLOCK) for size, work in worked) / GIB
    return Phase(0.0, 0.0, {}, ram, 2 * traces.parameters / GIB, "on the CPU, from file to file; 16-bit")


def _traced(found: Traced, slack: Slack, note: str) -> Phase:
    parts = {name: size / GIB for name, size in found.parts.items()}
    return Phase(found.peak / GIB, slack.peak(found.peak / GIB), parts, note=note)
