"""A picture of where the memory goes: a bar for each phase, the card's size as a line."""

from __future__ import annotations

from pathlib import Path

from sft import files
from sft.memory.live import PARTS
from sft.memory.plan import Plan

COLOURS = (
    "#33508c", "#4f77c4", "#8fb0e6", "#1f8a70", "#7cc6a4", "#c9a227", "#d9743c", "#b8405e", "#8e6bb0", "#c3b1dd",
)  # fmt: skip


def draw(made: Plan, target: Path) -> None:
    """Writes the picture as PNG, atomically."""
    from matplotlib.figure import Figure

    shown = {name: phase for name, phase in made.phases.items() if phase.allocated}
    figure = Figure(figsize=(9, 1.6 + 0.62 * len(shown)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for row, phase in enumerate(shown.values()):
        at = 0.0
        for part, colour in zip(PARTS, COLOURS, strict=True):
            size = phase.parts.get(part, 0.0)
            axes.barh(row, size, left=at, color=colour, label=part if row == 0 or size else None)
            at += size
        axes.barh(row, max(0.0, phase.peak - at), left=at, color="#dddddd", hatch="///", label="context and slack")
        axes.text(phase.peak, row, f" {phase.peak:.2f}", va="center", fontsize=9)
    colour = "#1a7f37" if made.fits else "#c62828"
    axes.axvline(made.device.gib, color=colour, linewidth=2)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    answer = "fits" if made.fits else "does not fit"
    name = f"{made.config.model.name}, {made.config.tuning.mode}, rows of {made.config.model.max_seq_len}"
    axes.set_title(f"{name}: {answer} {made.device.name} ({made.device.gib:.1f} GiB)", fontsize=10, color=colour)
    handles, labels = axes.get_legend_handles_labels()
    present = {part for phase in shown.values() for part, size in phase.parts.items() if size > 0.005}
    legend = {label: handle for handle, label in zip(handles, labels, strict=True) if label in present}
    legend["context and slack"] = handles[labels.index("context and slack")]
    axes.legend(legend.values(), legend.keys(), loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_file(target) as staged:
        figure.savefig(staged, format="png")
