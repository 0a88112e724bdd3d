"""Advises: prompting, few-shot, retrieval, an adapter or full fine-tuning, and writes a config for this card and data.

    python scripts/advise.py                                        asks on a terminal; data/raw or the processed rows
    python scripts/advise.py --raw_path questions.csv --task simple --budget low --yes
    python scripts/advise.py --examples 30 --knowledge special --facts daily       before there is any data
    python scripts/advise.py --gpu "RTX 4060" --model Qwen/Qwen2.5-1.5B-Instruct

Raw rows are processed into data/advised/<name>. Writes configs/advised.yaml, each value with its reason, which
`make train CONFIG=configs/advised.yaml` runs as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import console, files

if TYPE_CHECKING:
    from sft.config.load import Loaded
    from sft.config.schema import Config, DataSection
    from sft.data.store import Stage
    from sft.memory.devices import Device
    from sft.memory.plan import Plan
    from sft.preflight.advise import Facts, Setting, UseCase

BASE = "configs/config_base.yaml"
SAMPLE = 5_000  # rows that are tokenised
MARGIN = 0.1  # share of a card left free: the desktop, a browser
LONGEST = 2048  # tokens: longer rows are cut, unless a config says otherwise
QUESTIONS = {  # flag -> what is asked, its answers
    "task": ("how hard is the task? a label or a rewrite is simple, several steps of thought are complex",
             ("simple", "moderate", "complex")),
    "form": ("must answers have one strict form?", ("free", "strict")),
    "knowledge": ("do answers need knowledge that a general model lacks?", ("general", "special")),
    "facts": ("how often do the facts in the answers change?", ("rarely", "monthly", "weekly", "daily")),
    "latency": ("must answers come fast?", ("any", "tight")),
    "budget": ("how much computing may it cost? low: this machine for an evening", ("low", "medium", "high")),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__)
    add = result.add_argument
    add("--raw_path", metavar="FILE", help="raw data to process (default: the config's rows, processed if need be)")
    add("--user_col", metavar="NAME", help="column of the question, in a table")
    add("--answer_col", metavar="NAME", help="column of the answer")
    add("--examples", type=int, metavar="N", help="how many examples there will be, where there are none yet")
    for name, (question, choices) in QUESTIONS.items():
        add(f"--{name}", choices=choices, help=question)
    add("--model", metavar="NAME", help="the model to train (default: one for this machine)")
    add("--gpu", metavar="CARD", help='for another machine: `8GiB`, `"RTX 4060"` or `cpu`')
    add("--out", metavar="FILE", type=Path, help="the config to write (default: configs/advised.yaml)")
    add("--yes", action="store_true", help="ask nothing: what no flag says is measured or usual")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Read the rows, ask, decide, choose every value, write the config."""
    from sft.config.load import display_path, load, shipped
    from sft.memory import devices
    from sft.memory import report as memory_report
    from sft.memory.plan import make_plan
    from sft.preflight import advise

    root = console.project_root()
    columns = (("user", args.user_col), ("assistant", args.answer_col))
    args.set += [f"data.columns.{role}={name}" for role, name in columns if name]
    loaded = console.load_config(args)
    device = devices.parse(args.gpu) if args.gpu else devices.this_machine()

    # 1. the rows, and the model that they are for
    rows = read_data(args, loaded, root)
    if rows is None:
        approach, reasons = decide(ask(args, None, device), lambda: "", 0)
        console.say("no config is written without rows; with them: make advise RAW=FILE")
        return {"approach": approach, "reasons": reasons, "config": None}
    name, why = model_of(args, loaded, device, root)
    base = load(shipped(root, BASE), args.set, root=root)
    config = with_values(base.config, {"model.name": name, "data": rows.data})
    description = memory_report.model_config(config.model, root)
    facts = measure(config, rows, root)
    tokens, tokens_why = advise.length(facts, min(LONGEST, int(description.get("max_position_embeddings") or LONGEST)))
    tokens = config.model.max_seq_len if is_own(base, "model.max_seq_len") else tokens
    config = with_values(config, {"model.max_seq_len": tokens})
    if facts.pairs >= advise.STRICT and not is_own(base, "train.objective"):
        config = with_values(config, {"train.objective": "dpo"})

    # 2. the decision
    plans: dict[str, Plan] = {}

    def plan_of(mode: str) -> Plan:
        if mode not in plans:
            with console.progress(f"tracing the model ({mode})"):
                plans[mode] = make_plan(with_values(config, {"tuning.mode": mode}), description, device)
        return plans[mode]

    def full_problem() -> str:
        if facts.pairs >= advise.STRICT:
            return "preference pairs are compared with the base, which full tuning overwrites"
        plan = plan_of("full")
        return "" if plan.fits else f"it needs {plan.peak:.1f} GiB, and {device.name} has {device.gib:.1f}"

    case = ask(args, facts, device)
    approach, reasons = decide(case, full_problem, sorted(facts.sizes)[len(facts.sizes) // 2])

    # 3. the config
    mode, mode_why = (config.tuning.mode, "") if is_own(base, "tuning.mode") else mode_of(approach, plan_of, device)
    chosen: list[Setting] = [
        ("model.name", name, why),
        ("model.max_seq_len", tokens, tokens_why),
        ("tuning.mode", mode, mode_why),
        *rows.settings,
        ("train.output_dir", f"outputs/{out_of(args, root).stem}", "the run's folder and name"),
    ]
    if config.train.objective != "response":
        chosen.append(
            ("train.objective", config.train.objective, f"{facts.pairs:.0%} of the rows are preference pairs")
        )
    rank = config.tuning.lora.r if is_own(base, "tuning.lora.r") else None
    resolved = with_values(config, {"tuning.mode": mode})
    chosen += advise.settings(resolved, facts, case, device, plan_of(mode).parameters, rank)
    if args.gpu == "cpu":
        chosen.insert(1, ("model.device_map", "cpu", "--gpu cpu"))
    out = write(args, root, f"{approach}; {reasons[0]}", device, with_sets(chosen, args.set, base))
    plan = make_plan(load(out, root=root).config, description, device)
    console.say(
        f"plan: {'fits' if plan.fits else 'does NOT fit'} {device.name}: {plan.peak:.2f} of {device.gib:.1f} GiB"
    )
    for line in memory_report.help_lines(plan):
        console.say(console.as_typed(line))
    console.say(f"each value has its reason there; to train: make train CONFIG={display_path(out, root)}")
    counts = {name: facts.rows.get(name, 0) for name in ("train", "val", "test")}
    return {
        "approach": approach, "reasons": reasons, "case": vars(case), "rows": counts, "model": name, "mode": mode,
        "fits": plan.fits, "peak_gib": round(plan.peak, 3), "config": str(out),
    }  # fmt: skip


def mode_of(approach: str, plan_of: Callable[[str], Plan], device: Device) -> tuple[str, str]:
    """tuning.mode, and why."""
    if approach == "full SFT":
        return "full", "as advised; it fits"
    if device.kind == "cpu":
        return "lora", "adapters on a 16-bit base: 4-bit weights take twice the time on a CPU"
    if plan_of("lora").peak <= (1 - MARGIN) * device.gib:
        return "lora", "the 16-bit base fits"
    return "qlora", "the 16-bit base does not fit"


# --- the rows


@dataclass(frozen=True)
class Rows:
    """Processed rows. data: the config's section that finds them. settings: its values for the new config."""

    data: DataSection
    settings: list[Setting]
    stage: Stage


def read_data(args: argparse.Namespace, loaded: Loaded, root: Path) -> Rows | None:
    """The rows to advise on, processed first where they are raw; None without any, where --examples says how many."""
    from sft.config.load import display_path
    from sft.data import store
    from sft.data.process import process
    from sft.errors import DataError

    data = loaded.config.data
    try:
        if not args.raw_path:
            stage = store.resolve_stage(data, root)
            places = {name: getattr(data, name) for name in ("train_path", "val_path", "test_path")}
            settings: list[Setting] = [
                (f"data.{name}", value, "rows as the config named them") for name, value in places.items() if value
            ]
            if stage.name != "given":
                key = f"{stage.name}_dir"
                settings = [
                    (f"data.{key}", getattr(data, key), "rows that were processed before"),
                    ("data.stage", stage.name, "these rows and no others"),
                ]
            return Rows(data, settings, stage)
    except DataError:
        pass  # nothing is processed yet
    raw = args.raw_path or data.raw_path
    name = (raw or "raw").rstrip("/").rpartition("/")[2].partition(".")[0] or "raw"
    data = data.model_copy(update={"processed_dir": f"data/advised/{name}", "stage": "processed"})
    try:
        with console.progress("reading rows") as on_progress:
            ledger = process(data, root, args.raw_path, on_progress)
    except DataError:
        if args.examples is None or args.raw_path:
            raise
        return None
    for line in ledger.warnings:
        console.warn(line)
    splits = ", ".join(f"{count:,} {split}" for split, count in ledger.splits.items())
    console.say(f"rows: {ledger.read:,} read, {ledger.written:,} written to {data.processed_dir} ({splits})")
    source = display_path(Path(raw), root) if raw and Path(raw).exists() else raw
    columns = {role: column for role, column in (data.columns.model_dump() if data.columns else {}).items() if column}
    settings = [("data.raw_path", source, "where the rows come from: make process reads it again")] if source else []
    settings += [("data.columns", columns, "the columns of the table")] if columns else []
    settings += [
        (
            "data.processed_dir",
            data.processed_dir,
            f"{splits}; a folder of its own, so that no other rows are replaced",
        ),
        ("data.stage", "processed", "these rows and no others"),
    ]
    return Rows(data, settings, store.resolve_stage(data, root))


def measure(config: Config, rows: Rows, root: Path) -> Facts:
    """The facts of a sample of the rows, in tokens where the model's tokenizer can be had."""
    from sft.data import shards, store
    from sft.errors import ModelError
    from sft.generation.encoder import load_encoder
    from sft.preflight import advise
    from sft.report import data_report

    stage, split = rows.stage, config.data.split
    sample, train = data_report.sample_rows(store.iter_rows(stage.train), SAMPLE, split.seed)
    held_out = {name: shards.count(path) for name, path in stage.paths.items() if name != "train"}
    sizes, answers = list[int](), list[int]()
    try:
        encoder = load_encoder(config, root)
        with console.progress("tokenising") as on_progress:
            figures = data_report.token_figures(encoder, sample, on_progress)
        sizes = figures["sizes"]
        answers = [figures["by_role"].get(role, {}).get("longest", 0) for role in ("assistant", "target")]
    except ModelError as error:
        console.warn(f"lengths are estimated from characters, because there is no tokenizer yet: {error.what}")
    return advise.measure(sample, {"train": train, **held_out}, sizes, answers)


# --- the model and the questions


def model_of(args: argparse.Namespace, loaded: Loaded, device: Device, root: Path) -> tuple[str, str]:
    """The model that a flag, --set or a config of the user's own names, else the default of this machine; and why."""
    from sft.preflight.advise import models_for

    if args.model:
        return args.model, "your choice"
    origin = loaded.origin("model.name") or ""
    if not origin or origin.startswith("configs/config_base.yaml"):
        return models_for(device.name if device.kind == "cuda" else None, device.gib, root)[0]
    return loaded.config.model.name, f"from {origin}"


def is_own(base: Loaded, key: str) -> bool:
    """Whether --set sets the key: an explicit value is never changed."""
    return (base.origin(key) or "").startswith("--set")


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The config with other values of dotted keys; a model by another name has no revision."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        update = {name: value} | ({"revision": None} if key == "model.name" and value != config.model.name else {})
        new = getattr(config, section).model_copy(update=update) if name else value
        config = config.model_copy(update={section: new})
    return config


def ask(args: argparse.Namespace, facts: Facts | None, device: Device) -> UseCase:
    """What the rows cannot tell: from flags, else asked on a terminal, else the usual answer, which is shown."""
    from sft.preflight.advise import UseCase

    usual = {name: choices[0] for name, (_, choices) in QUESTIONS.items()} | {"task": "moderate"}
    usual["budget"] = "low" if device.kind == "cpu" or device.gib < 12 else "medium" if device.gib < 30 else "high"
    if facts is not None:
        usual["form"] = "strict" if facts.strict else "free"
        console.say(f"answers: {facts.form_text}")
    interactive, answers = sys.stdin.isatty() and not args.yes and not args.json, {}
    for name, (question, choices) in QUESTIONS.items():
        answer = getattr(args, name)
        while answer is None and interactive:
            text = input(f"{question} [{'/'.join(choices)}, Enter for {usual[name]}] ").strip().lower() or usual[name]
            answer = next((choice for choice in choices if choice.startswith(text)), None)
        answers[name] = answer or usual[name]
    assumed = [f"{name} {answers[name]}" for name in QUESTIONS if getattr(args, name) is None and not interactive]
    if assumed:
        console.say(
            f"taken as usual or measured (a flag changes it, e.g. --budget high): {', '.join(assumed)}", wrap=True
        )
    count = args.examples if args.examples is not None else sum(facts.rows.values()) if facts else 0
    return UseCase(
        count, answers["task"], answers["form"] == "strict", answers["knowledge"] == "special", answers["facts"],
        answers["latency"] == "tight", answers["budget"],
    )  # fmt: skip


def decide(case: UseCase, full_problem: Callable[[], str], row_tokens: int) -> tuple[str, list[str]]:
    """The approach and its reasons, shown with what speaks for the others."""
    from sft.preflight import advise

    approach, reasons = advise.recommend(case, full_problem, row_tokens)
    console.say(f"\nadvice: {approach}")
    for reason in reasons:
        console.say(f"  - {reason}", wrap=True)
    console.say("the others:")
    for name, text in advise.others(case, approach):
        console.say(f"  - {name}: {text}", wrap=True)
    return approach, reasons


# --- the config


def out_of(args: argparse.Namespace, root: Path) -> Path:
    return args.out or root / "configs" / "advised.yaml"


def with_sets(chosen: Sequence[Setting], sets: Sequence[str], base: Loaded) -> list[Setting]:
    """The settings with those of --set in their place."""
    from sft.config.schema import RENAMED

    settings = {key: (key, value, reason) for key, value, reason in chosen}
    for item in sets:
        key = RENAMED.get(item.partition("=")[0].strip(), item.partition("=")[0].strip())
        if not key.startswith("data.columns"):  # which the settings of the rows have as one mapping
            value: Any = base.config.model_dump()
            for part in key.split("."):
                value = value[part]
            settings[key] = (key, value, "your choice (--set)")
    return list(settings.values())


def write(args: argparse.Namespace, root: Path, advice: str, device: Device, chosen: Sequence[Setting]) -> Path:
    """Writes the config; an earlier one of that name gets the ending .bak."""
    from sft.config.load import display_path
    from sft.preflight.advise import yaml_text

    out = out_of(args, root)
    shown = display_path(out, root)
    head = [
        f"Written by `make advise` on {time.strftime('%Y-%m-%d')} for {device.name} ({device.gib:.1f} GiB).",
        f"Advice: {advice}",
        f"make train CONFIG={shown}",
    ]
    text = yaml_text(head, BASE, chosen)
    files.make_folder(out.parent)
    if out.exists() and out.read_text(encoding="utf-8") != text:
        out.replace(out.with_name(f"{out.name}.bak"))
        console.say(f"the earlier {shown} is now {out.name}.bak")
    files.write_text(out, text)
    return out


if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled here: saves a second of imports
    console.run(parser(), main)
