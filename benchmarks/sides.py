"""The trainers that are compared: ours, plain transformers, TRL. Each trains one model on the same rows for one epoch.

Time runs from the start of training to the end of the last step: data loading, collation and every callback count,
building the trainer and saving do not.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.material import ROOT, Row
from sft import console, runs
from sft.config import auto
from sft.config.schema import Config
from sft.model import hardware, kernels
from sft.step import attention
from sft.step.step import evaluate_loss, make_step_config
from sft.training.checkpoint import CheckpointManager
from sft.training.job import make_schedule
from sft.training.loop import TrainingLoop, step_batches


@dataclass(frozen=True)
class Settings:
    """Settings that all share. rows: of a step. micro_rows: of a peer's micro-batch (ours is sized by tokens)."""

    rows: int = 16
    micro_rows: int = 4
    longest: int = 512
    rate: float = 2e-4
    device: str = "cpu"
    bf16: bool = False
    checkpointing: bool = False
    folder: Path = Path("/tmp")
    tokens: int | str = "auto"  # our micro-batch
    dropout: float = 0.0  # of the adapters


@dataclass
class Clock(TrainerCallback):
    """Seconds of training, and the gradient norm of each step."""

    device: str = "cpu"
    norms: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = self._now()

    def time(self, loop: TrainingLoop) -> None:
        """Trains our loop with the same measurements at the same moments."""
        after_step = loop.after_step

        def timed_after_step(grad_norm: float, learning_rate: float) -> bool:
            stop = after_step(grad_norm, learning_rate)
            self.ended = self._now()
            return stop

        loop.after_step = timed_after_step  # type: ignore[method-assign]
        hook = loop.optimizer.optimizer.register_step_pre_hook(
            lambda *_: self.on_pre_optimizer_step(None, None, None, model=loop.model)
        )
        self.on_train_begin()
        loop.fit()
        hook.remove()


@dataclass(frozen=True)
class Round:
    """One round of one side.

    loss: the mean over the rows' labelled tokens after it. memory_mib: the highest rise; resident_mib: the highest size
    of the whole process, model and libraries included.
    """

    seconds: float
    memory_mib: float
    resident_mib: float
    norms: list[float]
    loss: float


class Side:
    """A trainer with its own model, whose adapter starts every round with the same weights."""

    def __init__(
        self,
        name: str,
        model: Any,
        settings: Settings,
        make: Callable[[Any, list[Row], Settings], Trainer | TrainingLoop],
    ) -> None:
        self.name, self.model, self.settings, self.make = name, model, settings, make
        self.start = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}

    def round(self, rows: list[Row]) -> Round:
        with torch.no_grad():
            for key, weight in self.model.named_parameters():
                if key in self.start:
                    weight.copy_(self.start[key])
        clock = Clock(self.settings.device)
        with _quiet():
            trainer = self.make(self.model, rows, self.settings)
            memory = Memory(self.settings.device)
            if isinstance(trainer, TrainingLoop):
                clock.time(trainer)
            else:
                trainer.remove_callback(PrinterCallback)
                trainer.add_callback(clock)
                trainer.train()
        return Round(clock.ended - clock.began, memory.rise(), memory.highest(), clock.norms, self._loss(rows))

    def _loss(self, rows: list[Row]) -> float:
        """After a round; on a CPU in fp32 for every side, so that it shows how the training was rounded, no more."""
        settings, types = self.settings, {name: weight.dtype for name, weight in self.model.named_parameters()}
        if settings.device == "cpu":
            settings = replace(settings, bf16=False)
            extract_model_from_parallel(self.model, keep_fp32_wrapper=False)  # else accelerate's autocast stays on it
            self.model.float()
        step_config = make_step_config(config(settings).train, self.model, "causal", settings.device)
        self.model.eval()
        evaluated = evaluate_loss(self.model, rows, step_config)
        self.model.train()
        for name, weight in self.model.named_parameters():
            weight.data = weight.data.to(types[name])
        return evaluated.loss_sum / evaluated.count


def config(settings: Settings) -> Config:
    """Our config, as a user would write it."""
    train = {
        "output_dir": str(settings.folder / "outputs" / "ours"),
        "epochs": 1,
        "learning_rate": settings.rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "effective_batch": settings.rows,
        "bf16": settings.bf16,
        "micro_batch_tokens": settings.tokens,
        "gradient_checkpointing": settings.checkpointing,
        "optim": "adamw_torch",
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    raw = {"model": {"name": "-", "max_seq_len": settings.longest}, "train": train, "logging": {"log_interval": 1000}}
    machine = hardware.probe() if settings.device == "cuda" else None
    facts = auto.Facts(settings.device, machine and machine.capability, bf16_supported=machine is None or machine.bf16)
    return auto.resolve(Config.model_validate(raw), facts).config


def ours(model: Any, rows: list[Row], settings: Settings) -> TrainingLoop:
    return loop_of(model, rows, settings, config(settings))


def loop_of(model: Any, rows: list[Row], settings: Settings, resolved: Config) -> TrainingLoop:
    step = make_step_config(resolved.train, model, "causal", settings.device)
    if settings.device == "cpu":
        kernels.apply_kernels(model, resolved.train.kernels, device="cpu", autocast=step.autocast)
    run = runs.at(Path(resolved.train.output_dir), settings.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # of a peer's other precision
    return TrainingLoop(
        model,
        rows,
        [],
        config=resolved,
        schedule=make_schedule(resolved, len(rows), validation=False),
        step=step,
        checkpoints=CheckpointManager(run, 1, lambda _: None),
    )


def _common(settings: Settings, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(settings.folder / "peer"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings.micro_rows,
        "gradient_accumulation_steps": settings.rows // settings.micro_rows,
        "learning_rate": settings.rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.checkpointing,
        "use_cpu": settings.device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        **more,
    }


def _padded(features: list[Row]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in features]
    return {
        "input_ids": pad_sequence(ids, True, 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0),
        "labels": pad_sequence([torch.tensor(row["labels"]) for row in features], True, -100),
    }


def plain(sampling: str) -> Callable[[Any, list[Row], Settings], Trainer]:
    """transformers' Trainer, padded to the longest of a micro-batch; sampling: `random` or `group_by_length`.

    `sorted` orders the whole set by length, which grouping approaches on a large set. `steps`: the same rows in each
    step as our trainer takes, those of a step sorted by length.
    """

    def make(model: Any, rows: list[Row], settings: Settings) -> Trainer:
        if sampling == "sorted":
            rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
        if sampling == "steps":
            steps = step_batches(len(rows), settings.rows, config(settings).train.seed, 0)
            rows = [rows[i] for step in steps for i in sorted(step, key=lambda i: len(rows[i]["input_ids"]))]
        strategy = "sequential" if sampling in ("sorted", "steps") else sampling
        args = TrainingArguments(
            **_common(settings, train_sampling_strategy=strategy, remove_unused_columns=False, log_level="error")
        )
        return Trainer(model=model, args=args, train_dataset=rows, data_collator=_padded)

    return make


def trl(*, packing: bool) -> Callable[[Any, list[Row], Settings], Trainer]:
    """TRL's SFTTrainer on the same tokens. Packed: rows of `longest` tokens, as many a step as 16 rows are."""

    def make(model: Any, rows: list[Row], settings: Settings) -> Trainer:
        from datasets import Dataset, disable_progress_bars
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        disable_progress_bars()
        more: dict[str, Any] = {"max_length": settings.longest, "packing": packing}
        if packing:
            mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
            steps = max(1, round(settings.rows * mean / settings.longest))
            more |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}
        args = SFTConfig(**{**_common(settings), **more}, log_level="error")
        data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "demo")
        return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)

    return make


def packed(model: Any, rows: list[Row], settings: Settings) -> Trainer:
    """TRL's packing (best-fit decreasing into `longest`, positions that restart) with transformers' own loss.

    This is TRL's packing before its loss moved to Triton, which has no CPU driver.
    """
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    disable_progress_bars()
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    steps = max(1, round(settings.rows * mean / settings.longest))
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    args = _common(settings, remove_unused_columns=False, log_level="error")
    args |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}
    return Trainer(
        model=model,
        args=TrainingArguments(**args),
        train_dataset=pack_dataset(data, settings.longest, "bfd"),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
    )


class Worker:
    """A side of a real model in a process of its own, so that the memory measured is its own: `round` as `Side` has it.

    name: of a trainer, with rows of a micro-batch for a peer and the type where it is not bf16: `ours`, `ours fp32`,
    `hf 8x2`, `hf 4x4 fp32`. All train on the same steps; each step's rows are sorted by length, which suits the peers.
    """

    def __init__(self, name: str, folder: Path, settings: Settings, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, theirs) = name, context.Pipe()
        environment = dict(os.environ)
        if name.startswith("ours"):  # threads and memory as our commands set them; the peers have the defaults
            console.quiet_libraries()
        context.Process(target=_work, args=(theirs, name, folder, settings, threads), daemon=True).start()
        os.environ.clear()
        os.environ.update(environment)

    def round(self, rows: list[Row]) -> Round:
        self.pipe.send(rows)
        result = self.pipe.recv()
        if isinstance(result, str):
            raise RuntimeError(result)
        return result  # type: ignore[no-any-return]


def _work(pipe: Any, name: str, folder: Path, settings: Settings, threads: int) -> None:
    import logging

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    trainer, _, cut = name.partition(" ")
    micro_rows = int(cut.split("x")[0]) if "x" in cut else 4
    settings = replace(settings, bf16="fp32" not in cut, micro_rows=micro_rows)

    def model(attn: str) -> Any:
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        attention.register()
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
        torch.manual_seed(1)
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=settings.dropout)
        return get_peft_model(base, adapters).train()

    side: Side | None = None
    while True:
        try:
            rows = pipe.recv()
        except EOFError:  # the benchmark has ended
            return
        try:
            side = (
                side or make_sides(model, settings, [{"hf": "hf steps", "trl": "trl default"}.get(trainer, trainer)])[0]
            )
            pipe.send(side.round(rows))
        except Exception as error:  # that a peer cannot run here is a result too
            pipe.send(f"{type(error).__name__}: {error}"[:200])


class Memory:
    """How far memory rises from now on: the resident size of this process, or the GPU's allocated bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from now on
        self.before = _status("VmRSS")

    def rise(self) -> float:
        """MiB."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return self.highest() - self.before / 1024

    def highest(self) -> float:
        """The highest resident size of this process since the start, MiB."""
        return _status("VmHWM") / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return 0


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def make_sides(model: Callable[[str], Any], settings: Settings, names: list[str]) -> list[Side]:
    """The trainers of these names. model: builds one with the named attention implementation."""
    makers = {
        "ours": ours,
        "hf dynamic": plain("random"),
        "hf grouped": plain("group_by_length"),
        "hf sorted": plain("sorted"),
        "hf steps": plain("steps"),
        "hf packed": packed,
        "trl default": trl(packing=False),
        "trl packing": trl(packing=True),
    }
    return [Side(name, model(attention.NAME if name == "ours" else "sdpa"), settings, makers[name]) for name in names]
