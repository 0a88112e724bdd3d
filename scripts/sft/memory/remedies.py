"""What would make a run fit: each change traced anew, by itself and then together with those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sft.config.schema import Config
from sft.memory.estimate import changed

WORTH = 0.01  # GiB: a remedy that saves less is left out
Peak = Callable[[Config], float]  # GiB that a config takes, with its `auto`s


@dataclass(frozen=True)
class Remedy:
    """A change of settings. setting: for `--set`. saves_gib: of the peak; costs: in words; slower: share of time more,
    None where that is not known; fits: whether it is enough by itself.
    """

    setting: str
    saves_gib: float
    costs: str
    slower: float | None
    fits: bool


@dataclass(frozen=True)
class Together:
    """The first remedies that are enough together, in order; all of them where even these are not."""

    settings: list[str]
    peak_gib: float
    fits: bool


@dataclass(frozen=True)
class _Change:
    settings: dict[str, Any]
    costs: str
    slower: float | None = None


def find(
    asked: Config, resolved: Config, peak: float, limit: float, measure: Peak, whole: Peak, *, gpu: bool
) -> tuple[list[Remedy], Together]:
    """Remedies in order of preference, those that save something; and how many of them it takes together.

    peak: GiB of a training step of `resolved`, which `asked` has become; limit: of the device. measure: GiB of another
    config's training step; whole: of its worst phase.
    """
    singles: list[Remedy] = []
    kept: list[dict[str, Any]] = []
    for change in _changes(asked, resolved, gpu=gpu):
        new = measure(_with(asked, change.settings))
        if peak - new > WORTH:
            singles.append(
                Remedy(
                    " ".join(_said(change.settings)), round(peak - new, 3), change.costs, change.slower, new <= limit
                )
            )
            kept.append(change.settings)
    merged: dict[str, Any] = {}
    reached, saved = peak, 0.0
    for settings, single in zip(kept, singles, strict=True):
        merged |= settings
        saved += single.saves_gib
        if peak - saved <= limit or single is singles[-1]:  # before, it is not worth tracing
            reached = whole(_with(asked, merged))
            if reached <= limit:
                break
    return singles, Together(_said(merged), round(reached, 3), reached <= limit)


def _changes(asked: Config, resolved: Config, *, gpu: bool) -> Iterator[_Change]:
    train, tuning, length = resolved.train, resolved.tuning, resolved.model.max_seq_len
    if int(train.micro_batch_tokens) > length:
        yield _Change({"train.micro_batch_tokens": length}, "speed: one row at max_seq_len at a time; the same steps")
    if train.gradient_checkpointing is not True:
        yield _Change({"train.gradient_checkpointing": True}, "about 1.45 times the time of a step", 0.45)
    if train.logits == "full":
        yield _Change({"train.logits": "chunked"}, "nothing: the same loss", 0.0)
    if gpu and not train.activation_offload:
        away = {"train.gradient_checkpointing": True, "train.activation_offload": True}
        yield _Change(away, "time: kept activations go to the machine's memory and back")
    if train.logits_tile > 128:
        yield _Change({"train.logits_tile": 128}, "a little speed of the head")
    if gpu:
        yield from _optimizers(train.optim)
    if tuning.mode == "lora":
        yield _Change({"tuning.mode": "qlora"}, "a base rounded to 4 bits, dequantised in every step", 0.3)
    if tuning.mode == "full":
        yield _Change({"tuning.mode": "lora"}, "adapters are trained, not the weights themselves", 0.0)
        yield _Change({"tuning.mode": "qlora"}, "adapters on a base rounded to 4 bits", 0.3)
    elif tuning.lora.r > 4:
        yield _Change({"tuning.lora.r": tuning.lora.r // 2}, "half the capacity of the adapter", 0.0)
    for shorter in (length // 2, length // 4):
        if shorter >= 64:
            cut: dict[str, Any] = {"model.max_seq_len": shorter}
            if asked.train.micro_batch_tokens != "auto":
                cut["train.micro_batch_tokens"] = shorter
            yield _Change(cut, f"rows longer than {shorter} tokens are cut or dropped", 0.0)


def _optimizers(now: str) -> Iterator[_Change]:
    if "8bit" not in now:
        yield _Change({"train.optim": "adamw_8bit"}, "optimizer state rounded to 8 bits", 0.02)
    if not now.startswith("paged"):
        yield _Change(
            {"train.optim": "paged_adamw_8bit"}, "optimizer state in the machine's memory when it is tight", 0.05
        )


def _with(config: Config, settings: dict[str, Any]) -> Config:
    """The config with these dotted keys changed."""
    for key, value in settings.items():
        config = _set(config, key.split("."), value)
    return config


def _set(section: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return changed(section, **{path[0]: inner})


def _said(settings: dict[str, Any]) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
