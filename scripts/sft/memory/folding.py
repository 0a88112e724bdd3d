"""A deep model's peak from two shallow ones: layers that repeat are drawn three and four times instead of, say, 64.

A computation is cut into windows wherever a layer begins or a gradient arrives; every window's highest moment grows by
the same bytes with each further period of layers, so the two depths give that of the full one. Nothing is fitted: the
result is that of the full trace to the byte (`tests/memory/test_folding.py`). Where layers do not repeat, or the two
depths do not go through the same windows, the model is traced whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sft.memory.live import Window

SHALLOW = {1: 3}  # periods of the shallower model, by the layers of a period; the deeper one has one more
LONG = 2  # the same where a period is of several layers


@dataclass(frozen=True)
class Stack:
    """Layers of one list that repeat: `times` periods of `period` layers after the first `start`."""

    layers: nn.ModuleList
    start: int
    period: int
    times: int


def stacks(model: nn.Module) -> list[Stack]:
    """The model's outermost lists of layers, those that repeat often enough to be worth it."""
    found: list[Stack] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        inside |= {id(inner) for inner in module.modules()}
        stack = _repeating(module, _lists(model, len(module)))
        if stack is not None:
            found.append(stack)
    return found


def shorten(model: nn.Module, *, deeper: bool) -> int:
    """Takes the same number of periods out of every stack, as many as can be missed; returns that number.

    deeper: one less. 0 where nothing repeats.
    """
    found = stacks(model)
    out = min((stack.times - _shallow(stack.period) for stack in found), default=0) - deeper
    if out <= 0:
        return 0
    for stack in found:
        end = stack.start + stack.period * (stack.times - out)
        kept = [*stack.layers[:end], *stack.layers[stack.start + stack.period * stack.times :]]
        stack.layers._modules = {str(index): layer for index, layer in enumerate(kept)}
    return out


def layers(model: nn.Module) -> list[list[nn.Module]]:
    """The layers of each outermost list, to be marked when they begin."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside |= {id(inner) for inner in module.modules()}
            found.append(list(module))
    return found


def unfold(shallow: Sequence[Window], deep: Sequence[Window], out: int) -> list[Window] | None:
    """The windows of the full model, of which `out` periods were left out of `shallow` and one less of `deep`.

    Of windows that repeat, the first and the last ones: those between lie between them. None where the two are not
    the same but for the repeating.
    """
    runs = [[(label, list(run)) for label, run in itertools.groupby(w, lambda x: x.label)] for w in (shallow, deep)]
    if [label for label, _ in runs[0]] != [label for label, _ in runs[1]]:
        return None
    full: list[Window] = []
    for (_, few), (_, more) in zip(*runs, strict=True):
        half, longer = (len(few) + 1) // 2, len(more) - len(few)
        if longer < 0:
            return None
        same = [*more[:half], *more[longer + half :]]
        full += [_grown(one, other, out) for one, other in zip(few, same, strict=True)]
    return full


def _grown(shallow: Window, deep: Window, out: int) -> Window:
    parts = {name: size + out * (deep.parts[name] - size) for name, size in shallow.parts.items()}
    total, standing = (
        (one + out * (other - one)) for one, other in ((shallow.total, deep.total), (shallow.standing, deep.standing))
    )
    return Window(shallow.label, total, standing, parts)


def _repeating(stack: nn.ModuleList, lists: list[Sequence[Any]]) -> Stack | None:
    kinds = [_kind(layer, [each[index] for each in lists]) for index, layer in enumerate(stack)]
    best: Stack | None = None
    for period in range(1, len(kinds) // LONG):
        start = len(kinds) - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        times = (len(kinds) - start) // period
        found = Stack(stack, start, period, times)
        left = len(kinds) - times * period
        drawn = (2 * _shallow(period) + 1) * period + 2 * left
        if drawn < len(kinds) and (best is None or _saved(found) > _saved(best)):
            best = found
    return best


def _saved(stack: Stack) -> int:
    return stack.period * (stack.times - _shallow(stack.period))


def _shallow(period: int) -> int:
    return SHALLOW.get(period, LONG)


def _kind(layer: nn.Module, listed: list[Any]) -> str:
    """All that a layer is made of: classes, shapes and plain settings, but for the number that it bears."""
    said: list[Any] = list(listed)
    for name, module in layer.named_modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = [(key, tuple(tensor.shape)) for key, tensor in tensors.items() if tensor is not None]
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | None)}
        settings = sorted((key, value) for key, value in plain.items() if key not in ("layer_idx", "layer_id"))
        said.append((name, type(module).__name__, shapes, settings))
    return repr(said)


def _lists(model: nn.Module, length: int) -> list[Sequence[Any]]:
    """What the config says layer by layer."""
    config: Any = getattr(model, "config", None)
    values = vars(config).values() if config is not None else ()
    return [value for value in values if isinstance(value, list | tuple) and len(value) == length]
