"""A plan in words, tables and a picture; plans of many models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import files
from sft.config.schema import Config, ModelSection
from sft.errors import ConfigError, SftError
from sft.memory.devices import Device
from sft.memory.estimate import OVERHEAD_SOURCE
from sft.memory.plan import MOST_TOKENS, Plan, make_plan
from sft.memory.scaling import EFFICIENCY, Speed
from sft.memory.shapes import shipped_models
from sft.memory.trace import Sharding, quiet
from sft.memory.tracker import PARTS

SHARDINGS = {  # what the processes share, and what each has whole
    "ddp": "a copy of the model on each",
    "zero2": "sharded, gathered once a micro-batch",
    "fsdp": "sharded, gathered twice a micro-batch",
}
CLUSTERS = (8, 64, 256, 1024)
Table = tuple[str, tuple[str, ...], Sequence[Sequence[str]]]  # title, columns, rows


def verdict(plan: Plan) -> list[str]:
    """The answer, in lines of at most 80 characters."""
    train, length = plan.config.train, plan.config.model.max_seq_len
    rows = max(1, min(int(train.batch_size), int(train.micro_batch_tokens) // length))
    lines = [
        f"{plan.config.model.name}, {plan.config.tuning.mode}, rows of {length} tokens:",
        f"{'fits' if plan.fits else 'does NOT fit'} {_devices(plan)}",
        f"  {plan.worst_phase} needs {plan.peak:.2f} GiB ({OVERHEAD_SOURCE[plan.device.kind]})",
        f"  a step: {train.effective_batch} rows, {rows} of {length} tokens at a time",
    ]
    if plan.smallest_card:
        lines.append(f"  the smallest card that would do: {plan.smallest_card}")
    return lines + ([] if plan.speed is None else _speed_lines(plan, plan.speed))


def _devices(plan: Plan) -> str:
    device = plan.device
    if device.count == 1:
        return f"{device.name} ({device.gib:.1f} GiB)"
    return f"{device.count} x {device.name} ({device.gib:.1f} GiB each), {SHARDINGS[plan.sharding]}"


def _speed_lines(plan: Plan, speed: Speed) -> list[str]:
    """What a step sends and how fast it can be, as a bound."""
    lines = [f"  each sends {speed.sent / 1e9:.3g} GB a step of {speed.tokens:,} tokens"]
    if speed.link is not None and speed.sending is not None:
        lines[0] += f": {speed.sending:.3g} s"
        lines.append(f"    over {speed.link[1]}, {speed.link[0]:g} GB/s in each direction (--link)")
    if speed.tokens_per_second is not None:
        low, high = speed.tokens_per_second
        lines.append(f"  its arithmetic takes {speed.arithmetic:.3g} s at {EFFICIENCY:.0%} of the published peak")
        lines.append(f"  so {low:,.0f} tokens/s, or {high:,.0f} where both overlap (not measured)")
    return lines


def tables(plan: Plan) -> list[Table]:
    """Where the memory goes in a training step, and the peak of every phase."""
    parts = [(name, f"{size:.2f}") for name, size in plan.training.parts.items()]
    parts.append(("in all", f"{plan.training.allocated:.2f}"))
    phases = [(name, f"{phase.peak:.2f}", phase.note) for name, phase in plan.phases.items()]
    return [
        ("a training step", ("part", "GiB"), parts),
        ("phases, with context and fragmentation", ("phase", "GiB", "of"), phases),
    ]


def help_lines(plan: Plan) -> list[str]:
    """Where the run does not fit: what each change saves, then the changes that suffice together."""
    if plan.combination is None:
        return []
    lines = ["what would help:"]
    if plan.device.count > 1 and plan.sharding == "ddp":
        lines.append("  --shard fsdp\n      the cards share the weights")
    for suggestion in plan.suggestions:
        enough = ", enough alone" if suggestion.fits else ""
        lines.append(f"  {suggestion.setting}\n      saves {suggestion.saves_gib:.2f} GiB{enough}; {suggestion.costs}")
    if plan.combination.fits:
        settings = " ".join(f"--set {setting}" for setting in plan.combination.settings)
        lines.append(f"it fits ({plan.combination.peak_gib:.2f} GiB) with {settings}")
    elif not any(suggestion.fits for suggestion in plan.suggestions):
        lines.append(f"all of them together still need {plan.combination.peak_gib:.2f} GiB")
    return lines


_COLOURS = (
    "#33508c", "#4f77c4", "#8fb0e6", "#1f8a70", "#7cc6a4", "#c9a227", "#d9743c", "#b8405e", "#8e6bb0", "#c3b1dd",
    "#6b6b6b", "#e58fb1",
)  # fmt: skip


def draw(plan: Plan, target: Path) -> None:
    """Writes a bar per phase as PNG, atomically."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.62 * len(plan.phases)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    names, phases = list(plan.phases), list(plan.phases.values())
    left = [0.0] * len(phases)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [phase.parts.get(part, 0.0) for phase in phases]
        axes.barh(names, widths, left=left, color=colour, label=part if max(widths) > 0.005 else None)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    overhead = [max(0.0, phase.peak - start) for phase, start in zip(phases, left, strict=True)]
    axes.barh(names, overhead, left=left, color="#dddddd", hatch="///", label="context and fragmentation")
    for row, phase in enumerate(phases):
        axes.text(phase.peak, row, f" {phase.peak:.2f}", va="center", fontsize=9)
    colour = "#1a7f37" if plan.fits else "#c62828"
    axes.axvline(plan.device.gib, color=colour, linewidth=2)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.set_title(" ".join(verdict(plan)[:2]), fontsize=10, color=colour)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_file(target) as staged:
        figure.savefig(staged, format="png")


def model_names(arguments: Sequence[str]) -> list[str]:
    """Names given as arguments or in files (a name a line, `#` for comments); the shipped list if there are none.

    Raises ConfigError for a file without names.
    """
    names: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if not path.is_file():
            names.append(argument)
            continue
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ConfigError("the file holds no model name", where=argument, fix="write one name per line")
        names += [line for line in lines if line]
    return names or list(shipped_models())


def model_config(section: ModelSection, root: Path) -> dict[str, Any]:
    """The config.json of `model.name`: its folder's, the shipped list's, or the hub's (the one file downloaded)."""
    from sft.model import hub

    shipped = shipped_models().get(section.name)
    if shipped is not None and hub.local_folder(section.name, root) is None:
        return shipped
    return hub.find(section, root, weights=False).config


def plan_models(
    names: Sequence[str],
    config: Config,
    device: Device,
    root: Path,
    progress: Callable[[int, int], None],
    sharding: Sharding = "ddp",
) -> dict[str, dict[str, Any]]:
    """The plan of every model under this config as JSON, smallest first; `error` says why one cannot be planned."""
    results: dict[str, dict[str, Any]] = {}
    with quiet("sft.config"):  # warnings about the settings would be repeated for every model
        for done, name in enumerate(names, 1):
            section = config.model.model_copy(update={"name": name, "revision": None})
            try:
                settings = config.model_copy(update={"model": section})
                plan = make_plan(settings, model_config(section, root), device, suggest=False, sharding=sharding)
                results[name] = {"billions": plan.parameters / 1e9, **plan.to_json()}
            except SftError as error:
                results[name] = {"fits": False, "error": str(error).splitlines()[0]}
            progress(done, len(names))
    return dict(sorted(results.items(), key=lambda item: float(item[1].get("billions", "inf"))))


def scaling_table(
    config: Config,
    description: dict[str, Any],
    device: Device,
    sharding: Sharding,
    link: float | None,
    price: float | None,
) -> tuple[Table, list[dict[str, Any]]]:
    """Plans for CLUSTERS of a card, each with a micro-batch a step: a table and the plans as JSON.

    price: of a card's hour, in any currency. Raises ConfigError for a card whose speed is not known.
    """
    rows: list[list[str]] = []
    plans: list[dict[str, Any]] = []
    share = max(1, MOST_TOKENS // config.model.max_seq_len)
    for count in CLUSTERS:
        train = config.train.model_copy(update={"effective_batch": count * share})
        settings, many = config.model_copy(update={"train": train}), replace(device, count=count)
        plan = make_plan(settings, description, many, suggest=False, sharding=sharding, link=link)
        speed = plan.speed
        if speed is None or speed.tokens_per_second is None:
            raise ConfigError(f"no published speed of {device.name} is known here", where="--gpu", fix="--gpu H100")
        slow, fast = speed.tokens_per_second
        figures = [f"{plan.peak:.1f}", f"{speed.tokens / 1e3:,.0f}", f"{speed.sent / 1e9:.1f}", f"{speed.sending:.2f}"]
        figures += [f"{speed.arithmetic:.2f}", f"{slow / 1e3:,.0f}", f"{fast / 1e3:,.0f}"]
        figures += [] if price is None else [f"{count * price * 1e9 / 3600 / slow:,.0f}"]
        rows.append([f"{count:,}", *figures])
        plans.append(plan.to_json())
    columns: tuple[str, ...] = ("cards", "GiB", "k tokens", "GB sent", "s link", "s math", "k/s", "at best")
    columns += () if price is None else ("cost",)
    return (f"{config.model.name}, {config.tuning.mode}, {device.name}: {SHARDINGS[sharding]}", columns, rows), plans
