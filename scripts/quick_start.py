"""The guided set-up behind workflows/quick_start.sh: choose model and data, process, check, train, evaluate, chat.

    python scripts/quick_start.py             guided on a terminal
    python scripts/quick_start.py --yes       takes every default
    python scripts/quick_start.py --demo      the small demo model

Reads data/raw; writes configs/local.yaml, which every command then takes by default, and what those commands write.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sft import console, files
from sft.errors import DataError, SftError
from sft.preflight import DEMO, SMALL, SMALL_PACKAGE

SAMPLE = "data/samples/support_desk.jsonl"
CPU_CONFIG, GPU_CONFIG = "configs/smollm2_cpu.yaml", console.DEFAULT_CONFIG
OUTPUT_DIR = "  output_dir: outputs/quick-start\n"
SAMPLE_EPOCHS = "  epochs: 1  # enough for the sample\n"  # without this line: auto
LOCAL = console.LOCAL_CONFIG
LONG = 20 * 60  # seconds of training on a CPU from which a cap is offered
OTHER_STEPS, SMALL_STEPS = 60, 180  # seconds that everything but download and training takes, about; of SmolLM2
CHARACTERS, TEMPLATE = 3.3, 20  # of a token; tokens of a row's template (SmolLM2: 2.4-4.1, tickets, sums, Alpaca)
ROLES = ("system", "user", "assistant", "tool")
MOST_COUNTED = 20_000  # rows
GENERAL = ["What is the capital of Japan?", "List three kinds of fruit."]
NEXT = """
What to do next:
  make infer                  chat with it (BASE=1: with the base model)
  make tensorboard            look at the curves
  make compare                what got better, what was forgotten, every answer on one page
  make merge && make merge-test   one folder of weights, checked (make export: for llama.cpp or Ollama)
  put your own file of examples into data/raw/ and run this again (docs/DATA.md: formats)
  docs/CONFIG.md has every setting; configs/local.yaml keeps yours"""


def parser() -> argparse.ArgumentParser:
    result = console.parser(__doc__, config=False)
    result.add_argument("--yes", action="store_true", help="take every default without asking")
    result.add_argument("--demo", action="store_true", help="use the shipped demo model")
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Choose data and model, process, preview, check, train, evaluate, chat."""
    root, started = console.project_root(), time.monotonic()
    interactive = sys.stdin.isatty() and not args.yes
    if earlier := earlier_model(root, args.demo):
        model = earlier
        console.say(f"model: {model} - from {LOCAL} (delete that file to choose again)")
        console.say(f"data:  {follow_data(root)}")
    else:
        raw, origin = raw_data(root)
        console.say(f"data:  {raw.relative_to(root)} ({origin})")
        model = choose_model(root, raw, args.demo, interactive)
    console.say(f"your settings are in {LOCAL}; edit it as you like, and start this again")
    step("process the data", "process_data")
    step("show what is trained on", "preview", "--limit", "1")
    step("check the set-up", "check")
    on_cpu = say_time(root, interactive)
    if interactive and input("\ntrain now? [Y/n] ").strip().lower() == "n":
        console.say("to start training later: make train")
        return {"model": model, "trained": False}
    step("train", "train")
    step("compare base and tuned model on the test split", "eval", "--split", "test", "--both", *bounds(root, on_cpu))
    show_answers(root)
    console.say(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes{NEXT}")
    if interactive:
        step("chat with it: a question of yours, /? for commands, /bye to leave", "infer")
    return {"model": model, "trained": True}


# --- the model


def earlier_model(root: Path, demo: bool) -> str | None:
    """The model of an existing configs/local.yaml, whose settings stay; None with --demo where it has another model."""
    from sft.config.load import load

    if not (root / LOCAL).exists():
        return None
    name = load(root / LOCAL, root=root).config.model.name
    if demo and name != DEMO:
        backup = root / f"{LOCAL}.{time.strftime('%Y%m%d-%H%M%S')}.bak"
        (root / LOCAL).rename(backup)
        console.say(f"--demo: your {LOCAL} is now {backup.name}")
        return None
    return name


def choose_model(root: Path, raw: Path, demo: bool, interactive: bool) -> str:
    """Takes the first model offered or asks, downloads it, and writes configs/local.yaml; returns its name.

    Where SmolLM2 cannot be downloaded after all, the next source is taken, with a warning. Raises SftError.
    """
    offers, on_gpu, fp32 = ([(DEMO, "--demo: it proves the pipeline and knows nothing")], False, "")
    if not demo:
        console.say("looking at this machine: GPU or CPU, how fast, what it can reach ...")
        offers, on_gpu, fp32 = in_child(offered_models, root, raw)
    name, reason = ask_model(offers, interactive)
    console.say(f"model: {name} - {reason}", wrap=True)
    fallbacks = {SMALL: SMALL_PACKAGE, SMALL_PACKAGE: DEMO}
    while name != DEMO and not (root / name).is_dir():
        try:
            step("download the model", "download_model", "--model", name)
            break
        except SftError:
            if name not in fallbacks:
                raise
            console.warn(f"{name} cannot be downloaded (see above): going on with {fallbacks[name]}")
            name = fallbacks[name]
    write_config(root, name, raw, on_gpu=on_gpu, fp32=fp32 if name in fallbacks else "")
    return name


def ask_model(offers: Sequence[tuple[str, str]], interactive: bool) -> tuple[str, str]:
    """The first offer, or the one that the user chooses."""
    if not interactive or len(offers) == 1:
        return offers[0]
    for number, (name, reason) in enumerate(offers, 1):
        console.say(f"  {number}. {name} - {reason}", wrap=True)
    while True:
        answer = input(f"which model? [1-{len(offers)}, Enter for 1, or a hub name] ").strip() or "1"
        if answer.isdigit() and 1 <= int(answer) <= len(offers):
            return offers[int(answer) - 1]
        if "/" in answer:
            return answer, "your choice"


def offered_models(root: Path, raw: Path) -> tuple[list[tuple[str, str]], bool, str]:
    """The models for this machine, each with why; whether it has a GPU; why fp32 beats bf16 on its CPU ("" if not)."""
    from sft.config.load import shipped
    from sft.files import read_json
    from sft.memory import shapes
    from sft.model.hardware import probe
    from sft.preflight.advise import models_for

    hardware = probe()
    gpu = hardware.name if hardware.device == "cuda" else None
    times, fp32 = dict[str, str](), ""
    if gpu is None:
        of_small = {bf16: cpu_speed(shapes.shipped_models()[SMALL], bf16=bf16) for bf16 in (True, False)}
        if of_small[False] > 1.1 * of_small[True]:
            fp32 = f"faster than bf16 on this CPU: {of_small[False]:,.0f} against {of_small[True]:,.0f} tokens/s"
        rows, tokens = count_tokens(root, raw)
        speed = max(of_small.values())
        times[SMALL] = times[SMALL_PACKAGE] = time_text(rows, tokens, speed, is_sample(root, raw), SMALL_STEPS)
        times[DEMO] = time_text(rows, tokens, cpu_speed(read_json(shipped(root, DEMO) / "config.json"), bf16=False), 6)
    return models_for(gpu, hardware.total_bytes / 2**30, root, times), gpu is not None, fp32


# --- how long it takes on a CPU


def count_tokens(root: Path, raw: Path) -> tuple[int, int]:
    """Rows of a raw file that have a known format, at most MOST_COUNTED, and about how many tokens they have."""
    from sft.data.formats import Formats, make_row
    from sft.data.readers import open_source
    from sft.data.rows import RowFault, texts

    formats, rows, characters = Formats("auto", None), 0, 0
    for raw_row in open_source(raw, root).rows():
        with suppress(RowFault):
            characters += sum(map(len, texts(make_row(raw_row, formats, None)[0], *ROLES)))
            rows += 1
        if rows == MOST_COUNTED:
            break
    return rows, round(characters / CHARACTERS) + TEMPLATE * rows


def time_text(rows: int, tokens: int, speed: float, epochs: int, other: int = OTHER_STEPS) -> str:
    """What an offer says about its time. epochs: 0 for `auto`; other: seconds of everything but training."""
    from sft.config import auto
    from sft.config.schema import Config

    if not rows:
        return "how long it takes is known once your rows are read"
    passes = epochs or auto.RULES["epochs"](Config(), auto.Facts("cpu", train_rows=rows))[0]
    seconds = 0.8 * tokens * passes / speed  # 0.8: of the rows are trained on
    least = "at least" if rows == MOST_COUNTED else "about"
    part = ", or a part of it in 20 min" if seconds > LONG else ""
    return f"{least} {console.duration(other + seconds)} on this machine{part}"


def cpu_speed(description: Mapping[str, Any], *, bf16: bool, full: bool = False) -> float:
    """Tokens a second that a training step makes on this CPU: measured on the model's first layers, with dummy weights.

    description: a decoder's config.json. full: every weight is trained, not LoRA adapters. The best of two to four
    steps of 1,024 tokens, a third of them in the loss; all layers are taken to cost the same.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.config.schema import TuningSection
    from sft.model import adapters
    from sft.model.load import quiet_libraries
    from sft.step import attention
    from sft.step.batch import Collator
    from sft.step.step import StepConfig, forward_backward

    quiet_libraries()

    layers = int(description["num_hidden_layers"])
    few, dtype = min(layers, 3), torch.bfloat16 if bf16 else torch.float32
    first = {key: value[:few] if isinstance(value, list) and len(value) == layers else value
             for key, value in description.items()}  # fmt: skip
    config: Any = AutoConfig.for_model(**{**first, "num_hidden_layers": few, "dtype": None})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if full else dtype, attn_implementation=attention.choose("cpu", description)
        )
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(0.01)
    model.train().config.use_cache = False
    if not full:
        model = adapters.attach(model, TuningSection(mode="lora"), gradient_checkpointing=False)
    rows = [{"input_ids": [1] * 128, "labels": [-100] * 85 + [1] * 43}] * 8
    is_packed = attention.keeps_rows_apart(model)
    settings = StepConfig("causal", "cpu", 1024, packed=is_packed, autocast=dtype if bf16 else None)
    hidden = torch.ones(8 * 43, int(config.hidden_size), dtype=dtype)
    head = adapters.head(model).weight.detach().to(dtype)
    of_step, of_head = list[float](), list[float]()
    while len(of_step) < 2 or (len(of_step) < 4 and sum(of_step) < 3):
        model.zero_grad()
        started = time.perf_counter()
        forward_backward(model, Collator("causal")(rows), settings)
        of_step.append(time.perf_counter() - started)
        started = time.perf_counter()
        _ = (hidden @ head.T) @ head
        of_head.append(time.perf_counter() - started)
    return 1024 / (min(of_head) + (min(of_step) - min(of_head)) * layers / few)


def planned(root: Path) -> tuple[int, int, float] | None:
    """Steps and tokens that training has left, and its tokens a second on this CPU (0: not known); None on a GPU."""
    from sft import runs
    from sft.config.load import load
    from sft.model import hardware
    from sft.training import job as jobs

    loaded = load(root / LOCAL, root=root)
    if hardware.choose(loaded.config.model.device_map).device != "cpu":
        return None
    logger = logging.getLogger("sft")
    level = logger.level
    logger.setLevel(logging.ERROR)  # training says the same again
    job = jobs.prepare(loaded, root)
    logger.setLevel(level)
    checkpoint = runs.open_run(job.config.train.output_dir, root, "auto").checkpoint
    steps = job.schedule.total_steps - (runs.step_of(checkpoint) if checkpoint else 0)
    a_run = sum(job.rows.train.lengths().tolist()) * job.schedule.total_steps / job.schedule.steps_per_epoch  # type: ignore[attr-defined]
    tokens = round((a_run + job.extra_tokens) * steps / job.schedule.total_steps)
    mode, bf16 = job.config.tuning.mode, bool(job.config.train.bf16)
    is_known = mode != "qlora" and job.files.kind == "causal"
    return steps, tokens, cpu_speed(job.files.config, bf16=bf16, full=mode == "full") if is_known else 0.0


def say_time(root: Path, interactive: bool) -> bool:
    """Says how long training takes if it is on a CPU, and returns whether it is.

    Where that is over 20 minutes, it offers (or with --yes sets) a cap: `train.max_steps` in configs/local.yaml. A
    number of steps or epochs that is there is not changed.
    """
    from sft.config.load import load

    if (plan := in_child(planned, root)) is None:
        return False
    steps, tokens, speed = plan
    seconds = tokens / speed if speed else 0.0
    about = f"about {console.duration(seconds)} at {speed:,.0f} tokens/s, as measured" if speed else "time not known"
    console.say(f"training: {steps:,} steps, {tokens:,} tokens: {about}", wrap=True)
    loaded = load(root / LOCAL, root=root)
    train, where = loaded.config.train, loaded.origin("train.epochs") or ""
    is_chosen = train.max_steps is not None or (train.epochs != "auto" and where.startswith(f"{LOCAL}:"))
    if seconds <= LONG or is_chosen:
        return True
    cap = max(1, int(steps * LONG / seconds))
    if interactive and input(f"stop after {cap:,} steps, about 20 min? [Y/n] ").strip().lower() == "n":
        return True
    text = (root / LOCAL).read_text(encoding="utf-8")
    line = f"  max_steps: {cap}  # about 20 minutes; without this line: {steps} steps\n"
    if text.count(OUTPUT_DIR) != 1:
        console.say(f"to stop earlier: make train SET=train.max_steps={cap}")
        return True
    files.write_text(root / LOCAL, text.replace(OUTPUT_DIR, OUTPUT_DIR + line))
    console.say(
        f"it stops after {cap:,} of {steps:,} steps: train.max_steps in {LOCAL}; delete that line for all of them",
        wrap=True,
    )
    return True


def bounds(root: Path, on_cpu: bool) -> list[str]:
    """Flags with which the evaluation takes a minute or two on a CPU: short answers of the sample, or fewer rows."""
    from sft.config.load import load, resolve_path

    if not on_cpu:
        return []
    raw = resolve_path(root, load(root / LOCAL, root=root).config.data.raw_path or "data/raw/raw.jsonl")
    is_ours = raw.is_file() and is_sample(root, raw)
    return ["--set", "generation.max_new_tokens=64"] if is_ours else ["--limit", "50"]


# --- the data and configs/local.yaml


def follow_data(root: Path) -> str:
    """What the data of an existing configs/local.yaml is; a `raw_path` in data/raw follows the file there is now."""
    from sft.config.load import dump_yaml, load

    path = root / LOCAL
    loaded = load(path, root=root)
    where, name = loaded.origin("data.raw_path") or "", loaded.config.data.raw_path or ""
    if not name.startswith("data/raw/") or not where.startswith(f"{LOCAL}:"):
        return f"from {LOCAL}"
    raw, origin = raw_data(root)
    current = raw.relative_to(root).as_posix()
    if current != name:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        at = int(where.rpartition(":")[2]) - 1
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at] = indent + dump_yaml({"raw_path": current})
        files.write_text(path, "".join(lines))
    if not is_sample(root, raw) and SAMPLE_EPOCHS in (text := path.read_text(encoding="utf-8")):
        files.write_text(path, text.replace(SAMPLE_EPOCHS, ""))
    return f"{current} ({origin})"


def write_config(root: Path, model: str, raw: Path, *, on_gpu: bool, fp32: str = "") -> None:
    """Writes configs/local.yaml. fp32: why this CPU computes in fp32."""
    from sft.config.load import dump_yaml

    settings = {
        "include": "configs/demo_cpu.yaml" if model == DEMO else GPU_CONFIG if on_gpu else CPU_CONFIG,
        "model": {"name": model},
        "data": {"raw_path": raw.relative_to(root).as_posix()},
    }
    text = (
        f"# Written by the quick start on {time.strftime('%Y-%m-%d')}; every command takes it by default.\n"
        f"# Edit it freely, or delete it to go back to {GPU_CONFIG}. Every key: docs/CONFIG.md\n"
        f"{dump_yaml(settings)}train:\n{OUTPUT_DIR}"
    )
    if model != DEMO and not on_gpu:
        text += SAMPLE_EPOCHS if is_sample(root, raw) else ""
        text += f"  bf16: false  # {fp32}\n" if fp32 else ""
    files.write_text(root / LOCAL, text)


def is_sample(root: Path, raw: Path) -> bool:
    """Whether the raw file is (a copy of) the shipped sample."""
    return (root / SAMPLE).is_file() and filecmp.cmp(raw, root / SAMPLE, shallow=False)


def raw_data(root: Path) -> tuple[Path, str]:
    """The raw file to use and where it comes from; copies the shipped sample where data/raw is empty.

    The copy of the sample gives way to any other file. Raises DataError if data/raw holds several files and none is
    called raw, or none that can be read.
    """
    from sft.data.readers import SUFFIXES, is_data_file, plain_name

    folder, sample = root / "data" / "raw", root / SAMPLE
    copied = folder / "raw.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if copied in entries and is_sample(root, copied):
        if entries == [copied]:
            return copied, f"a copy of {SAMPLE}"
        entries.remove(copied)
    texts = [path for path in entries if path.suffix.lower() == ".txt"]
    data_files = [path for path in entries if path.is_file() and is_data_file(path)] or texts
    names = ", ".join(path.name for path in data_files or entries)
    if called_raw := [path for path in data_files if plain_name(path).stem.lower() == "raw"]:
        kinds = [*SUFFIXES, "", ".txt"]
        return min(called_raw, key=lambda path: kinds.index(plain_name(path).suffix.lower())), "yours"
    if len(data_files) > 1:
        fix = "rename the one to use to raw with its own ending: raw.jsonl, raw.csv, raw.jsonl.gz"
        raise DataError(f"data/raw holds several files: {names}", where=str(folder), fix=fix)
    if data_files:
        return data_files[0], "yours"
    if entries:
        fix = "put a .jsonl, .json, .csv, .xlsx or .parquet file there, or empty the folder to use the sample"
        raise DataError(f"data/raw holds no file of rows, only: {names}", where=str(folder), fix=fix)
    shutil.copyfile(sample, copied)
    return copied, f"data/raw was empty: copied {SAMPLE}"


# --- the other commands


def show_answers(root: Path) -> None:
    """Shows base and tuned answers to the first test rows and, of a language model, to general questions."""
    from sft.config.load import load
    from sft.errors import one_line

    def short(text: str) -> str:
        return one_line(text, 100) + " ..." * (len(text) > 100)

    lines = (root / "outputs" / "samples.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    rows = []
    for sample in map(json.loads, lines):
        right = sample["prediction"].strip() == sample["reference"].strip()
        note = "(as it should be)" if right else f"(should be: {short(sample['reference'])})"
        answers = [short(sample["base"]["prediction"]), f"{short(sample['prediction'])}\n{note}"]
        rows.append([short(sample["prompt"]), *answers])
    if load(root / LOCAL, root=root).config.model.name != DEMO:  # which knows nothing
        rows += [[short(text) for text in row] for row in in_child(general_answers, root)]
    console.table("\nbase and tuned", ["question", "base", "tuned"], rows, text=True)


def general_answers(root: Path) -> list[list[str]]:
    """(question, base answer, tuned answer) of the general questions."""
    from sft.generation import load

    target = load.resolve_model(root / LOCAL, [], is_default=True, root=root)
    system = load.system_text(target.config, target.folder, root)
    turns = [{"role": "system", "content": system}] if system else []
    questions = [{"messages": [*turns, {"role": "user", "content": question}]} for question in GENERAL]
    short = target.config.generation.model_copy(update={"max_new_tokens": 64, "stop_loops": True})
    config = target.config.model_copy(update={"generation": short})
    of = {
        side: load.answer_all(model, questions, config)
        for side, model in load.open_sides(target, ["base", "tuned"], root)
    }
    texts = [[answer.text if answer else "" for answer in of[side]] for side in ("base", "tuned")]
    return [list(cells) for cells in zip(GENERAL, *texts, strict=True)]


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, in a process of its own: torch's memory is free again before the training."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def step(title: str, script: str, *flags: str) -> None:
    """Runs one command of the kit; raises SftError with its exit code where it fails.

    Ctrl-C is for that command alone: training then writes its checkpoint before it ends.
    """
    path = Path(__file__).with_name(f"{script}.py")
    console.say(f"\n== {title}: python scripts/{script}.py {' '.join(flags)}".rstrip())
    target = {"process_data": "process", "eval": "eval-test"}.get(script, script)
    env = {**os.environ, "SFT_MAKE": target, "MAKEFLAGS": ""}  # so that fixes are make commands
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.run([sys.executable, str(path), *flags], env=env, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, handler)
    if code in (130, 143, -signal.SIGINT):  # the command's own message says what to do
        sys.exit(code if code > 0 else 130)
    if code:
        error = SftError(f"the quick start stopped at: {title}", fix="follow the message above, then start it again")
        error.exit_code = code if code > 0 else 1
        raise error


if __name__ == "__main__":
    console.run(parser(), main)
