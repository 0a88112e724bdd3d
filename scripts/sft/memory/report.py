"""The plan in words and tables, and how long the run would take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.config.schema import Config
from sft.errors import ConfigError, SftError
from sft.memory import estimate, shapes
from sft.memory.plan import Plan
from sft.memory.shapes import known_models
from sft.memory.trace import PARTS

if TYPE_CHECKING:
    from sft.config.schema import Config, ModelSection
    from sft.memory.devices import Device


CHARACTERS_A_TOKEN = 4.0  # of English text, roughly
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Duration:
    """tokens_per_second: computed ones, by formula. tokens: of the whole run, None where no rows are prepared.
    speed: what of the device was counted on, in words.
    """

    flops_per_token: float
    tokens_per_second: float
    tokens: int | None
    speed: str

    @property
    def seconds(self) -> float | None:
        """For all epochs."""
        return None if self.tokens is None else self.tokens / self.tokens_per_second

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "seconds": self.seconds}


def duration(made: Plan, config: Config, description: Mapping[str, Any], root: Path) -> Duration | None:
    """How fast the run would go, None where nothing is known of the device. Rows are read from the prepared file."""
    known = estimate.rate(made.device, *((made.slack.flops, made.slack.flops_of) if made.slack else (None,)))
    if known is None:
        return None
    counted = shapes.count(description, config.tuning, name=config.model.name)
    rows, tokens = _prepared(config, root)
    length = tokens / rows if rows else config.model.max_seq_len
    work = estimate.operations(counted, made.config.tuning, made.config.train, length=length)
    epochs = float(made.config.train.epochs)
    return Duration(work, known[0] / work, int(tokens * epochs) if rows else None, known[1])


def _prepared(config: Config, root: Path) -> tuple[int, float]:
    """(rows, tokens) of the prepared training file, by its size; (0, 0) where there is none."""
    given = config.data.train_path or f"{config.data.processed_dir}/train.jsonl"
    path = root / given
    if not path.is_file():
        return 0, 0.0
    with path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return rows, min(path.stat().st_size / CHARACTERS_A_TOKEN, float(rows * config.model.max_seq_len))


def tables(made: Plan) -> list[Table]:
    """Where the memory goes, every phase, and (where it does not fit) what would help."""
    needed = made.estimate
    rows: list[tuple[Any, ...]] = [(name, f"{size:.2f}") for name, size in needed.parts.items()]
    rows += [("allocated in a training step", f"{needed.allocated:.2f}")]
    found: list[Table] = [
        (f"{made.config.model.name}, {made.config.tuning.mode} ({made.method})", ("part", "GiB"), rows)
    ]
    phases = [
        (name, f"{one.peak:.2f}" if one.peak else "", _gib(one.ram), _gib(one.disk), one.note)
        for name, one in made.phases.items()
    ]
    found.append(("phases, with context and slack", ("phase", "GiB", "RAM", "disk", "of"), phases))
    if made.remedies:
        lines = [
            (r.setting, f"{r.saves_gib:.2f}", r.costs, _percent(r.slower), "yes" if r.fits else "no")
            for r in made.remedies
        ]
        found.append(("what would help", ("--set", "saves GiB", "costs", "time", "enough alone"), lines))
    return found


def lines(made: Plan, took: Duration | None) -> list[str]:
    """The answer in sentences."""
    train, device = made.config.train, made.device
    said = [
        f"{'fits' if made.fits else 'does NOT fit'} {device.name} ({device.gib:.1f} GiB):"
        f" {made.estimate.peak:.2f} GiB in {made.worst} (slack and context {made.slack.source if made.slack else ''})",
        f"a step: {train.effective_batch} rows, {train.batch_size} of {made.config.model.max_seq_len} tokens at a time"
        f" (micro-batches of at most {train.micro_batch_tokens} tokens)",
    ]
    if made.sixteen_bit_experts:
        said.append(
            f"{made.sixteen_bit_experts / 1e9:.2f}e9 weights of experts stay in 16 bit: transformers keeps them as one"
            " tensor, and bitsandbytes quantises linear layers alone (attention and shared experts here)"
        )
    if device.kind == "cuda" and made.card:
        said.append(f"the smallest card that would do: {made.card}")
    if took is not None:
        time = "" if took.seconds is None else f", {_time(took.seconds)} for all epochs of the prepared rows (roughly)"
        said.append(f"about {took.tokens_per_second:,.0f} tokens/s{time} ({took.speed})")
    if made.together is not None:
        how = "fits with" if made.together.fits else "does not fit even with"
        settings = " ".join(f"--set {setting}" for setting in made.together.settings)
        said.append(f"{how} {settings or 'any remedy'} ({made.together.peak_gib:.2f} GiB)")
    return said


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size:.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"+{share:.0%}" if share else "same"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


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


_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
_DECODERS: dict[str, tuple[Any, ...]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", 960, 2560, 32, 15, 5, 64, 49152, True),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "google/gemma-3-1b-it": ("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, True),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "google/gemma-2-2b-it": ("gemma2", 2304, 9216, 26, 8, 4, 256, 256000, True),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "microsoft/Phi-3.5-mini-instruct": ("phi3", 3072, 8192, 32, 32, 32, 96, 32064, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
    "allenai/OLMo-2-1124-7B-Instruct": ("olmo2", 4096, 11008, 32, 32, 32, 128, 100352, False),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "google/gemma-2-9b-it": ("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, True),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
}
_T5 = {"google/flan-t5-base": (768, 2048, 12, 12), "google/flan-t5-large": (1024, 2816, 24, 16)}


def models() -> dict[str, dict[str, Any]]:
    """Hub names and configs, in no order of size."""
    found = dict(known_models())
    for name, values in _DECODERS.items():
        found[name] = dict(zip(_KEYS, values, strict=True))
        if found[name]["model_type"] == "phi3":
            found[name]["pad_token_id"] = 32000
    for name, (width, inner, layers, heads) in _T5.items():
        found[name] = {
            "model_type": "t5",
            "is_encoder_decoder": True,
            "d_model": width,
            "d_ff": inner,
            "d_kv": 64,
            "num_layers": layers,
            "num_heads": heads,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        }
    return found


def listed(given: Sequence[str]) -> list[str]:
    """Model names: those given, those in a file that is given (a name a line, `#` for remarks), or the shipped list.

    Raises ConfigError for a file without names.
    """
    found: list[str] = []
    for each in given:
        path = Path(each)
        if not path.is_file():
            found.append(each)
            continue
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ConfigError("there is no model name in it", where=each, fix="write one name a line")
        found += [line for line in lines if line]
    return found or list(models())


def description(section: ModelSection, root: Path) -> dict[str, Any]:
    """The config.json of `model.name`: its folder's, the list's, or the hub's (the one file that is fetched)."""
    from sft.model import hub

    known = models().get(section.name)
    if known is not None and hub.local_folder(section.name, root) is None:
        return known
    return hub.find(section, root, weights=False).config


def each(
    names: Sequence[str], config: Config, device: Device, root: Path, report: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """The plan of every model under this config, smallest first; one that cannot be planned says why."""
    from sft.memory import plan

    logging.getLogger("sft.config").setLevel(logging.ERROR)  # what is said of one model's settings is noise here
    found: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names, 1):
        section = config.model.model_copy(update={"name": name, "revision": None})
        try:
            settings = config.model_copy(update={"model": section})
            made = plan.make_plan(settings, description(section, root), device, root=root, fix=False)
            found[name] = {"billions": made.parameters / 1e9, **made.to_json()}
        except SftError as error:
            found[name] = {"fits": False, "error": str(error).splitlines()[0]}
        report(done, len(names))
    return dict(sorted(found.items(), key=lambda item: float(item[1].get("billions", "inf"))))
