"""The training loop: epochs, steps, evaluation, logging, saving and resuming.

Read `TrainingLoop.fit` first, then `train_step` and `after_step`: they call everything else, which follows in
that order. A step is a batch of `train.effective_batch` rows; `sft.step` splits it into micro-batches. accelerate has
the device, the gradient scaler and clipping, transformers the learning-rate schedules and the choice of optimizers.
Everything that happens after a step happens at its end (log, evaluate, save, stop, in this order), so a checkpoint
always knows the evaluation of its own step.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft import files
from sft.config.schema import PREFERENCES, Config, TrainSection
from sft.errors import RunError, one_line
from sft.model import kernels, shard
from sft.model.adapters import unwrap
from sft.runs import step_of
from sft.step.batch import Collator, count_labels, loss_weight
from sft.step.optimizer import averaged_weights, begin_training, create_optimizer, create_scheduler, end_training
from sft.step.preferences import means
from sft.step.step import StepConfig, evaluate_loss, forward_backward, optimizer_step
from sft.training import checkpoint as ckpt
from sft.training import distributed
from sft.training.checkpoint import CheckpointManager, Progress
from sft.training.loggers import Loggers
from sft.training.monitor import LossMonitor
from sft.training.signals import SignalHandler

if TYPE_CHECKING:
    from sft.step.ewc import Consolidation
    from sft.training.rehearsal import Rehearsal

log = logging.getLogger("sft.training")
Feature = Mapping[str, Any]
Answer = Callable[[Any], tuple[dict[str, float], str]]  # the model -> metrics of generated answers, a few as Markdown


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    metric: the one that chooses the best checkpoint, None without evaluation while training.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    metric: str | None


def step_batches(rows: int, effective_batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The row indices of each step of an epoch, over all ranks: each takes every world-th row of a step.

    The order depends only on seed and epoch, so that resuming is exact. No row is dropped or repeated: the last step is
    smaller, and a rank's share may be empty.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator).tolist()
    return [order[start : start + effective_batch] for start in range(0, rows, effective_batch)]


class RowsAt(Sequence[Feature]):
    """Some of the rows, each read when it is used."""

    def __init__(self, rows: Sequence[Feature], indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.indices[index]]


class TrainingLoop:
    """Trains `model` on `rows` (features with `id`, `input_ids`, `labels`).

    config: resolved. step: how a step is computed; lowered when memory runs out. rehearsal: whose rows follow the
    task's in `rows`; None for none. ewc: the penalty on leaving the base; None for none. answer: generates from a
    sample of validation rows at each evaluation, None for losses only. loggers: of rank 0, None for none.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Feature],
        validation: Sequence[Feature],
        *,
        config: Config,
        schedule: Schedule,
        step: StepConfig,
        checkpoints: CheckpointManager,
        rehearsal: Rehearsal | None = None,
        ewc: Consolidation | None = None,
        answer: Answer | None = None,
        loggers: Loggers | None = None,
    ) -> None:
        self.model, self.rows, self.validation, self.rehearsal = model, rows, validation, rehearsal
        self.ewc, self.ewc_penalty = ewc, 0.0
        if sharded := shard.is_sharded(model):
            step = replace(step, lockstep=distributed.largest_number)
        self.sharded, self.device = sharded, torch.device(step.device) if sharded else next(model.parameters()).device
        self.settings, self.schedule, self.step, self.initial_step = config.train, schedule, step, step
        self.log_every = config.logging.log_interval
        self.checkpoints, self.answer, self.loggers = checkpoints, answer, loggers or Loggers()
        shard.release(model)
        if (engine := shard.engine_of(model)) is None:
            optimizer = create_optimizer(model, self.settings, config.tuning.lora.lora_plus_ratio)
            self.accelerator = make_accelerator(self.settings, step.device)  # last: the other resets it
            self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        else:
            self.accelerator, self.optimizer = engine, engine.optimizer
        self.engine = engine
        if step.device.startswith("cuda"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(self.settings.tf32)
        self.scheduler = create_scheduler(self.optimizer, config.train, schedule.warmup_steps, schedule.total_steps)
        self.signals = SignalHandler(checkpoints.run.folder, partial(distributed.largest, device=self.device))
        self.progress = Progress(max_steps=schedule.total_steps)
        self.greater_is_better = bool(self.settings.greater_is_better)
        self.monitor = LossMonitor(schedule.metric, self.greater_is_better, self.settings.early_stopping)
        self.pairs = self.settings.objective in PREFERENCES
        self.collate = Collator(step.kind, self.settings.normalize)
        self._last_entry = (0, 0.0)  # tokens and seconds at the last log entry
        self.until: int | None = None

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self, checkpoint: Path | None = None, until: int | None = None) -> None:
        """Trains until the schedule ends, early stopping does, or a stop is requested; resumes from `checkpoint`.

        until: the step after which it evaluates, writes a checkpoint and returns, the schedule being that of all steps.
        """
        from transformers import set_seed

        set_seed(self.settings.seed)
        self.until = until
        try:
            with self.signals:
                self._fit(checkpoint)
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            raise RunError(
                f"{distributed.LOST} ({one_line(error, 120)})",
                where=f"after step {self.progress.global_step}",
                fix="run the same command: it resumes from the newest checkpoint",
            ) from error

    def _fit(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self.resume(checkpoint)
        begin_training(self.optimizer)
        self.loggers.begin(self.progress)
        stop = self.complete or (self.until is not None and self.progress.global_step >= self.until)
        for epoch, indices in self._remaining_steps():
            if stop:
                break
            batch = self._load_batch(indices)
            grad_norm, learning_rate = self.train_step(batch)
            self.progress.global_step += 1
            steps_in_epoch = self.progress.global_step - epoch * self.schedule.steps_per_epoch
            self.progress.epoch = epoch + steps_in_epoch / self.schedule.steps_per_epoch
            stop = self.after_step(grad_norm, learning_rate) or self.complete
        end_training(self.optimizer)

    @property
    def complete(self) -> bool:
        """Whether no step is left to take."""
        return self.progress.global_step >= self.schedule.total_steps or self.monitor.stop_early

    def _remaining_steps(self) -> Iterator[tuple[int, list[int]]]:
        """(epoch, this rank's row indices) of every step from the current one on, without end."""
        done, (rank, world) = self.progress.global_step, (distributed.rank(), distributed.world())
        batch, seed = int(self.settings.effective_batch), self.settings.seed
        rows = len(self.rows) - (len(self.rehearsal.features) if self.rehearsal else 0)
        epochs = (step_batches(rows, batch, seed, epoch) for epoch in itertools.count())
        steps: Iterator[list[int]] = itertools.chain.from_iterable(epochs)
        if self.rehearsal is not None:
            steps = self.rehearsal.mix(steps)
        for number, indices in enumerate(steps):  # from the first one on: what is added depends on the steps before
            if number >= done:
                yield number // self.schedule.steps_per_epoch, indices[rank::world]

    def _load_batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The step batch of these rows on the CPU, with their ids under "ids"; without tensors for an empty share."""
        features = [self.rows[index] for index in indices]
        batch: dict[str, Any] = dict(self.collate(features)) if features else {}
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {**batch, "ids": [str(feature["id"]) for feature in features]}

    def train_step(self, batch: dict[str, Any]) -> tuple[float, float]:
        """One optimizer step; returns its gradient norm (before clipping) and the learning rate that it used."""
        began, progress = time.monotonic(), self.progress
        self.model.train()
        ids = batch.pop("ids")
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        tokens = sum(int(batch[name].sum()) for name in ("lengths", "source_lengths") if name in batch)
        sizes = [loss_weight(batch) if batch else 0.0, count_labels(batch) if batch else 0, tokens]
        weight, *counts = distributed.all_reduce(torch.tensor(sizes, dtype=torch.float64, device=self.device)).tolist()
        labels, tokens = (int(count) for count in counts)
        progress.tokens, progress.labelled = progress.tokens + tokens, progress.labelled + labels
        if not labels:
            log.warning("step %d has no labelled token: it trains nothing", progress.global_step + 1)
            self.monitor.gradient(0.0)

        backward = self.accelerator.backward
        loss, self.step, measures = forward_backward(
            self.model, batch, self.step, normalizer=weight or 1, backward=backward, reduce=distributed.all_reduce
        )
        if not self.sharded:
            distributed.sum_gradients(self.model.parameters())
            tokens = -distributed.largest([-self.step.micro_batch_tokens], self.device)[0]
            self.step = replace(self.step, micro_batch_tokens=tokens)  # where memory ran out on any rank
        if self.pairs:
            sums = distributed.all_reduce(measures.double()).tolist()
            progress.measures = [
                old + new for old, new in zip(progress.measures or [0.0] * len(sums), sums, strict=True)
            ]
        mean_loss = float(distributed.all_reduce(loss.detach().double()))

        grad_norm, learning_rate = 0.0, float(self.optimizer.param_groups[0]["lr"])
        usable = self._check_finite(mean_loss, "loss", ids)
        if usable:
            progress.last_loss = mean_loss
        if usable := usable and labels > 0:  # without gradients, a gradient scaler would refuse to step
            if self.ewc is not None:  # the same on every rank, once the gradients are summed
                scaler = self.accelerator.scaler
                self.ewc_penalty = float(self.ewc.add_gradients(1.0 if scaler is None else scaler.get_scale()))
            max_norm = self.settings.max_grad_norm or math.inf
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
            grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if self.accelerator.scaler is None:  # a gradient scaler detects and skips infinite gradients itself
                self.monitor.gradient(grad_norm)
                usable = self._check_finite(grad_norm, "gradient norm", ids)
                grad_norm = grad_norm if usable else 0.0
        if usable and self.engine is None:  # which has updated the weights as it clipped the gradients
            optimizer_step(self.optimizer, self._halve_micro_batches)
        if not (usable and self.accelerator.optimizer_step_was_skipped):
            self.scheduler.step()
        self.model.zero_grad(set_to_none=True)
        progress.unlogged = (progress.unlogged[0] + progress.last_loss, progress.unlogged[1])
        progress.seconds += time.monotonic() - began
        return grad_norm, learning_rate

    def after_step(self, grad_norm: float, learning_rate: float) -> bool:
        """Logs, evaluates and saves as the schedule, the signals and early stopping say; returns whether to stop."""
        step, settings = self.progress.global_step, self.settings
        stop, save = self.signals.poll()
        is_end = step == self.until
        stop = stop or is_end
        if stop or step in (1, self.schedule.total_steps) or step % self.log_every == 0:
            loss_sum, last_logged = self.progress.unlogged
            entry = {"loss": loss_sum / (step - last_logged), "grad_norm": grad_norm, "learning_rate": learning_rate}
            if self.ewc is not None:
                entry["ewc_penalty"] = self.ewc_penalty
            if self.pairs:
                entry |= means(self.progress.measures)
                self.progress.measures = []
            if self.progress.skipped:
                entry["windows_skipped"] = len(self.progress.skipped)
            tokens, seconds = self._last_entry
            self._last_entry = (self.progress.tokens, self.progress.seconds)
            entry["tokens_per_second"] = (self.progress.tokens - tokens) / max(self.progress.seconds - seconds, 1e-9)
            self.log(entry)
            self.progress.unlogged = (0.0, step)
        self.loggers.step(self.progress)
        eval_steps = settings.eval_steps or settings.save_steps
        if self.schedule.metric and (is_end or self._is_due(settings.eval_strategy, eval_steps)):
            with averaged_weights(self.optimizer):
                is_best = self._update_best(self.evaluate(), self.schedule.metric)
            save = save or (is_best and settings.load_best_model_at_end) or self.monitor.stop_early
        if save or stop or self._is_due(settings.save_strategy, settings.save_steps):
            with averaged_weights(self.optimizer):
                self.save()
        return stop

    def _is_due(self, strategy: str, every: int) -> bool:
        """Whether what is done every so many steps or every epoch is done now; after the last step it always is."""
        step = self.progress.global_step
        every = self.schedule.steps_per_epoch if strategy == "epoch" else every
        return strategy != "no" and (step >= self.schedule.total_steps or step % every == 0)

    # -- logging and evaluation ----------------------------------------------------------------------------------------

    def log(self, entry: dict[str, float]) -> None:
        """Adds an entry to the history and sends it to the loggers."""
        entry = {**entry, "epoch": self.progress.epoch}
        self.progress.log_history.append({**entry, "step": self.progress.global_step})
        if warning := self.monitor.add(self.progress.log_history[-1]):
            log.warning(warning)
        self.loggers.entry(self.progress.global_step, entry)

    def evaluate(self) -> dict[str, float]:
        """The exact mean loss over the validation rows' labelled tokens, and the metrics of generated answers.

        Restores the random state, so that evaluating never changes what is trained.
        """
        start, samples = time.monotonic(), ""
        self.loggers.busy(self.progress.global_step, "evaluating")
        self.model.eval()
        with torch.random.fork_rng():
            mine = range(distributed.rank(), len(self.validation), distributed.world())
            result = evaluate_loss(self.model, RowsAt(self.validation, mine), self.step, distributed.all_reduce)
            self.step = result.config
            sums = [result.loss_sum, result.count, *result.measures.tolist()]
            sums = distributed.all_reduce(torch.tensor(sums, dtype=torch.float64, device=self.device)).tolist()
            loss = sums[0] / max(1.0, sums[1])
            metrics = {"eval_loss": loss, **self.monitor.gap(loss)}
            if self.pairs:
                metrics |= {f"eval_{name}": value for name, value in means(sums[2:]).items()}
            else:
                metrics["eval_perplexity"] = math.exp(min(loss, 700.0))
            if self.answer is not None:
                with self.step.forward_context():
                    scores, samples = self.answer(self.model)
                metrics |= {f"eval_{name}": value for name, value in scores.items()}
        self.model.train()
        shard.release(self.model)
        self.log({**metrics, "eval_seconds": time.monotonic() - start})
        if samples:
            self.loggers.text(self.progress.global_step, "eval/samples", samples)
        return metrics

    def _update_best(self, metrics: Mapping[str, float], metric: str) -> bool:
        """Whether this evaluation is the best so far; notes it, and logs a line that says so."""
        progress, value = self.progress, metrics[f"eval_{metric}"]
        best, stop_rate = progress.best_metric, metrics.get("eval_stop_rate")
        stops = stop_rate is None or stop_rate >= self.settings.min_stop_rate
        better = math.isfinite(value) and (best is None or (value > best if self.greater_is_better else value < best))
        verdict = f"step {progress.global_step}: validation loss {metrics['eval_loss']:.4f}"
        if metric != "loss":
            verdict += f", {metric} {value:.4f}"
        if best is not None:
            than = f"{best:.4f} at step {progress.best_global_step}"
            verdict += f", better than {than}" if better else f", not better than {than}"
        if (accuracy := metrics.get("eval_rewards/accuracies")) is not None:
            verdict += f"; the chosen answer is ahead in {accuracy:.0%} of the pairs"
        if stop_rate is not None:
            verdict += f"; {stop_rate:.0%} of the sample answers end by themselves"
        log.info(verdict if stops else f"{verdict}: too few for the best checkpoint (train.min_stop_rate)")
        if better and stops:
            progress.best_metric, progress.best_global_step = value, progress.global_step
        return better and stops

    # -- when something goes wrong -------------------------------------------------------------------------------------

    def _check_finite(self, value: float, what: str, ids: list[str]) -> bool:
        """Whether `value` is finite; if not, the step is dropped under `on_nan: skip`, else RunError names its rows."""
        if math.isfinite(value):
            return True
        self.model.zero_grad(set_to_none=True)
        step = self.progress.global_step + 1
        rows = [name for share in distributed.all_gather(ids) for name in share]
        alone = self._not_finite_alone(rows if self.sharded else ids)
        if not self.sharded:
            alone = [name for share in distributed.all_gather(alone) for name in share]
        where = f"the rows of this step: {', '.join(rows)}"
        if alone and len(alone) < len(rows):
            where += f"; not finite by themselves: {', '.join(alone)}"
        if self.settings.on_nan == "skip":
            self.progress.skipped.append({"step": step, "what": f"{what} is {value}", "rows": rows})
            count = len(self.progress.skipped)
            log.warning("skipping step %d, %d skipped so far: the %s is %s (%s)", step, count, what, value, where)
            return False
        older = [path.name for path in self.checkpoints.run.checkpoints()]
        raise RunError(
            f"the {what} is {value} at step {step}: training cannot continue",
            where=where,
            fix="look at those rows (make preview), lower train.learning_rate, use bf16 instead of fp16, or"
            " --set train.on_nan=skip; "
            + (f"{older[-1]} was saved before this step" if older else "there is no checkpoint yet"),
        )

    def _not_finite_alone(self, ids: Sequence[str]) -> list[str]:
        """The ids of those rows whose loss is not finite when they are computed alone."""
        names, training = set(ids), self.model.training
        self.model.eval()
        rows = [row for row in self.rows if row["id"] in names]
        sums = {str(row["id"]): evaluate_loss(self.model, [row], self.step).loss_sum for row in rows}
        self.model.train(training)
        shard.release(self.model)
        return [name for name, loss_sum in sums.items() if not math.isfinite(loss_sum)]

    def _halve_micro_batches(self) -> None:
        self.step = replace(self.step, micro_batch_tokens=max(1, self.step.micro_batch_tokens // 2))
        log.warning("micro-batches have at most %d tokens from here on", self.step.micro_batch_tokens)

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of this step. A disk that refuses rank 0 stops every rank."""
        progress, scaler = self.progress, self.accelerator.scaler
        progress.asked_budget, progress.budget = self.initial_step.budget, self.step.budget
        progress.evaluating, progress.kernels = self.step.eval_tokens, kernels.kernels_of(self.model)
        progress.checkpointing = bool(getattr(unwrap(self.model), "is_gradient_checkpointing", False))
        states = {
            **({} if self.sharded else {ckpt.OPTIMIZER: self.optimizer.state_dict()}),
            ckpt.SCHEDULER: self.scheduler.state_dict(),
            ckpt.RNG: distributed.all_gather(ckpt.random_state()),
            **({} if scaler is None else {ckpt.SCALER: scaler.state_dict()}),
            **({} if self.rehearsal is None else {ckpt.REHEARSAL: self.rehearsal.state()}),
        }
        self.loggers.sync()
        weights, parts = shard.whole_state(self.model), None
        if self.sharded:
            parts = self.checkpoints.save_parts(self.model, self.optimizer, progress.global_step)
        distributed.on_rank0(lambda: str(self.checkpoints.save(self.model, progress, states, weights, parts)))

    def resume(self, checkpoint: Path) -> None:
        """Restores everything that the next step depends on; checkpoints of later steps are renamed."""
        distributed.on_rank0(lambda: self.checkpoints.archive_newer(step_of(checkpoint)))
        ckpt.load_weights(self.model, checkpoint)
        ckpt.restore_optimizer(checkpoint, self.optimizer, self.scheduler, self.model)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(ckpt.read_state(checkpoint, ckpt.SCALER))
        self.progress = progress = replace(Progress.read(checkpoint), max_steps=self.schedule.total_steps)
        self._last_entry = (progress.tokens, progress.seconds)
        for entry in progress.log_history:
            self.monitor.add(entry)
        if progress.asked_budget == self.initial_step.budget:  # then the budget that fit when memory ran out
            self.step = replace(self.step, micro_batch_tokens=progress.budget[0], eval_tokens=progress.evaluating)
        else:
            log.info("micro-batches are split differently than before: same steps, but the last bits may differ")
        if (was := progress.kernels) != (now := kernels.kernels_of(self.model)):
            log.info("kernels were %s and are now %s: same steps, but the last bits may differ", was, now)
        evaluations = (e for e in progress.log_history if "eval_loss" in e and e["step"] == progress.best_global_step)
        other_metric = next(evaluations, {}).get(f"eval_{self.schedule.metric}") != progress.best_metric
        if other_metric or (self.settings.load_best_model_at_end and self._best_folder() is None):  # begin anew
            progress.best_global_step = progress.best_metric = None
        states = ckpt.read_state(checkpoint, ckpt.RNG)
        if distributed.rank() < len(states):  # a rank that is new starts from the seed
            ckpt.restore_random_state(states[distributed.rank()])

    def load_best(self) -> int | None:
        """Loads the weights of the best evaluation; returns its step, None if the last weights are the result."""
        best = self.progress.best_global_step
        if best is None or not self.settings.load_best_model_at_end:
            return None
        if best != self.progress.global_step:
            if (folder := self._best_folder()) is None:
                return None
            ckpt.load_weights(self.model, folder)
        return best

    def _best_folder(self) -> Path | None:
        """The checkpoint of the best evaluation; None, with a warning, if it is damaged."""
        folder = self.checkpoints.folder(self.progress.best_global_step or 0)
        problem = distributed.on_rank0(lambda: files.manifest_problem(folder))
        if problem and self.progress.best_global_step:
            log.warning("the best checkpoint, %s, cannot be used: %s", folder.name, problem)
        return None if problem else folder


def make_accelerator(train: TrainSection, device: str) -> Any:
    """The accelerator for one step batch a step.

    bf16 is not left to it: the step computes under autocast itself. fp16 is, because the gradient scaler belongs to it.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    return Accelerator(
        cpu=not device.startswith("cuda"),
        mixed_precision="fp16" if train.fp16 is True else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
