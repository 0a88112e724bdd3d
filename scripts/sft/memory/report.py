"""A plan in words, tables and a picture; how long the run takes; plans of many models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft import files
from sft.config.schema import Config, ModelSection
from sft.errors import ConfigError, SftError
from sft.memory.devices import Device
from sft.memory.estimate import OVERHEAD_SOURCE, flops_per_token, presumed_flops
from sft.memory.plan import Plan, make_plan
from sft.memory.shapes import shipped_models
from sft.memory.trace import PARTS, quiet

CHARACTERS_PER_TOKEN = 4.0  # of English text, roughly
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]  # title, columns, rows


def duration(plan: Plan, root: Path) -> dict[str, Any] | None:
    """How fast the run would go, as JSON; None for a device of unknown speed.

    `tokens` (of all epochs, estimated from the prepared file) and `seconds` are None if no rows are prepared.
    """
    known = presumed_flops(plan.device)
    if known is None:
        return None
    flops, source = known
    config, rows, tokens = plan.config, 0, 0.0
    path = root / (config.data.train_path or f"{config.data.processed_dir}/train.jsonl")
    if path.is_file():
        with path.open("rb") as file:
            rows = sum(1 for line in file if line.strip())
        tokens = min(path.stat().st_size / CHARACTERS_PER_TOKEN, float(rows * config.model.max_seq_len))
    length = tokens / rows if rows else config.model.max_seq_len
    per_token = flops_per_token(plan.size, config.tuning, config.train, length=length)
    all_tokens = int(tokens * float(config.train.epochs)) if rows else None
    return {
        "flops_per_token": per_token,
        "tokens_per_second": flops / per_token,
        "tokens": all_tokens,
        "speed": source,
        "seconds": None if all_tokens is None else all_tokens * per_token / flops,
    }


def tables(plan: Plan) -> list[Table]:
    """Where the memory goes, every phase, and (where it does not fit) what would help."""
    parts = [(name, f"{size:.2f}") for name, size in plan.training.parts.items()]
    parts.append(("allocated in a training step", f"{plan.training.allocated:.2f}"))
    phases = [
        (name, f"{phase.peak:.2f}" if phase.peak else "", _gib(phase.ram), _gib(phase.disk), phase.note)
        for name, phase in plan.phases.items()
    ]
    result: list[Table] = [
        (f"{plan.config.model.name}, {plan.config.tuning.mode} (traced)", ("part", "GiB"), parts),
        ("phases, with context and fragmentation", ("phase", "GiB", "RAM", "disk", "of"), phases),
    ]
    if plan.suggestions:
        rows = [
            (s.setting, f"{s.saves_gib:.2f}", s.costs, _percent(s.slower), "yes" if s.fits else "no")
            for s in plan.suggestions
        ]
        result.append(("what would help", ("--set", "saves GiB", "costs", "time", "enough alone"), rows))
    return result


def sentences(plan: Plan, duration: dict[str, Any] | None) -> list[str]:
    """The answer in sentences."""
    train, device = plan.config.train, plan.device
    lines = [
        f"{'fits' if plan.fits else 'does NOT fit'} {device.name} ({device.gib:.1f} GiB): {plan.peak:.2f} GiB in"
        f" {plan.worst_phase} (context and fragmentation {OVERHEAD_SOURCE})",
        f"a step: {train.effective_batch} rows, {train.batch_size} of {plan.config.model.max_seq_len} tokens at a time"
        f" (micro-batches of at most {train.micro_batch_tokens} tokens)",
    ]
    if plan.sixteen_bit_experts:
        lines.append(
            f"{plan.sixteen_bit_experts / 1e9:.2f}e9 weights of experts stay in 16 bit: transformers stores them as one"
            " tensor, and bitsandbytes quantises linear layers only (attention and shared experts here)"
        )
    if plan.smallest_card:
        lines.append(f"the smallest card that would do: {plan.smallest_card}")
    if duration is not None:
        seconds = duration["seconds"]
        time = "" if seconds is None else f", {_time(seconds)} for all epochs of the prepared rows (roughly)"
        lines.append(f"about {duration['tokens_per_second']:,.0f} tokens/s{time} ({duration['speed']})")
    if plan.combination is not None:
        verdict = "fits with" if plan.combination.fits else "does not fit even with"
        settings = " ".join(f"--set {setting}" for setting in plan.combination.settings)
        lines.append(f"{verdict} {settings or 'any of these'} ({plan.combination.peak_gib:.2f} GiB)")
    return lines


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size:.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"+{share:.0%}" if share else "same"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


_COLOURS = (
    "#33508c", "#4f77c4", "#8fb0e6", "#1f8a70", "#7cc6a4", "#c9a227", "#d9743c", "#b8405e", "#8e6bb0", "#c3b1dd",
)  # fmt: skip


def draw(plan: Plan, target: Path) -> None:
    """Writes a bar per phase as PNG, atomically."""
    from matplotlib.figure import Figure

    phases = {name: phase for name, phase in plan.phases.items() if phase.allocated}
    present = {part for phase in phases.values() for part, size in phase.parts.items() if size > 0.005}
    figure = Figure(figsize=(9, 1.6 + 0.62 * len(phases)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(phases)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [phase.parts.get(part, 0.0) for phase in phases.values()]
        axes.barh(range(len(phases)), widths, left=left, color=colour, label=part if part in present else None)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    overhead = [max(0.0, phase.peak - start) for phase, start in zip(phases.values(), left, strict=True)]
    axes.barh(range(len(phases)), overhead, left=left, color="#dddddd", hatch="///", label="context and fragmentation")
    for row, phase in enumerate(phases.values()):
        axes.text(phase.peak, row, f" {phase.peak:.2f}", va="center", fontsize=9)
    colour = "#1a7f37" if plan.fits else "#c62828"
    axes.axvline(plan.device.gib, color=colour, linewidth=2)
    axes.set_yticks(range(len(phases)), list(phases))
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    name = f"{plan.config.model.name}, {plan.config.tuning.mode}, rows of {plan.config.model.max_seq_len}"
    verdict = f"{'fits' if plan.fits else 'does not fit'} {plan.device.name} ({plan.device.gib:.1f} GiB)"
    axes.set_title(f"{name}: {verdict}", fontsize=10, color=colour)
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
    names: Sequence[str], config: Config, device: Device, root: Path, progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """The plan of every model under this config as JSON, smallest first; `error` says why one cannot be planned."""
    results: dict[str, dict[str, Any]] = {}
    with quiet("sft.config"):  # warnings about the settings would be repeated for every model
        for done, name in enumerate(names, 1):
            section = config.model.model_copy(update={"name": name, "revision": None})
            try:
                settings = config.model_copy(update={"model": section})
                plan = make_plan(settings, model_config(section, root), device, suggest=False)
                results[name] = {"billions": plan.size.parameters / 1e9, **plan.to_json()}
            except SftError as error:
                results[name] = {"fits": False, "error": str(error).splitlines()[0]}
            progress(done, len(names))
    return dict(sorted(results.items(), key=lambda item: float(item[1].get("billions", "inf"))))
