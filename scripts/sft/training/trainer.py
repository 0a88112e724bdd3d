"""The loop: transformers' Trainer, whose batch is a whole window.

Plain Trainer for causal and seq2seq models alike: the window leaves TRL's SFTTrainer and Seq2SeqTrainer nothing to do.
Only methods are overridden: here the order of rows, one step and evaluation; in `resumable` what is written and read
back.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback

from sft.step.batch import Collator, count_labels
from sft.step.step import CarefulOptimizer, StepConfig, evaluate_loss, forward_backward
from sft.training import distributed, windows
from sft.training.checkpoint import CheckpointManager
from sft.training.flow import Flow
from sft.training.meter import Meter
from sft.training.numbers import Numbers, gap
from sft.training.resumable import ResumableTrainer

log = logging.getLogger("sft.training")
Answers = Callable[[Any], dict[str, float]]


class WindowTrainer(ResumableTrainer):
    """Trains `model` on `rows` (features with `id`, `input_ids`, `labels`), one window a step.

    answers: generates from a sample of validation rows and gives their metrics, or None.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        rows: Sequence[windows.Feature],
        validation: Sequence[windows.Feature],
        *,
        effective_batch: int,
        step_config: StepConfig,
        keeper: CheckpointManager,
        flow: Flow,
        answers: Answers | None = None,
        callbacks: Sequence[Any] = (),
        on_nan: str = "stop",
    ) -> None:
        self.numbers = Numbers(on_nan, keeper.run, self._not_finite_alone)
        super().__init__(model=model, args=args, train_dataset=rows, callbacks=[flow, self.numbers, *callbacks])
        self.pop_callback(PrinterCallback)
        self.pop_callback(DefaultFlowCallback)
        self.rows, self.validation, self.keeper, self.flow = rows, validation, keeper, flow
        self.step_config, self.asked_budget = step_config, step_config.budget
        self.effective_batch, self.answers = effective_batch, answers
        self.meter = Meter()
        self._last_ids: list[str] = []

    def get_train_dataloader(self) -> Any:
        order = windows.Windows(
            len(self.rows), self.effective_batch, self.args.seed, rank=distributed.rank(), world=distributed.world()
        )
        pin = self.args.device.type == "cuda"
        return windows.loader(self.rows, order, Collator(self.step_config.kind), pin=pin)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The next window. What it costs stands in the log as `input_wait`, a share of the time of steps."""
        self.meter.ask()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.meter.arrived()
        return found

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Losses of the window over all ranks: what its gradient is divided by. Counts its tokens on the way."""
        self.meter.begin()
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            if "labels" in batch:
                tokens = sum(int(batch[key].sum()) for key in ("lengths", "source_lengths") if key in batch)
                counts += torch.tensor([count_labels(batch), tokens], device=device)
        taken, tokens = (int(count) for count in distributed.all_reduce(counts))
        if not taken:
            log.warning("step %d has no labelled token: nothing is learnt from it", self.state.global_step + 1)
        self.meter.labelled += taken
        self.meter.tokens += tokens
        return max(1, taken)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one window; returns its mean loss over all ranks' labelled tokens."""
        self.model.train()
        device = self.args.device
        batch = {key: value.to(device, non_blocking=True) for key, value in inputs.items() if key != "ids"}
        self._last_ids = inputs["ids"]
        loss = torch.zeros((), device=self.args.device)
        if batch:
            loss, self.step_config = forward_backward(
                self.model,
                batch,
                self.step_config,
                normalizer=num_items_in_batch,
                backward=self.accelerator.backward,
            )
        distributed.sum_gradients(self.model.parameters())
        loss = distributed.all_reduce(loss.detach().float())
        if not self._finite(float(loss), "loss"):
            return loss.new_tensor(self.numbers.last)
        self.numbers.last = float(loss)
        return loss

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.optimizer = CarefulOptimizer(self.optimizer, self._halve_budget)
        return prepared

    def _halve_budget(self) -> None:
        tokens = max(1, self.step_config.micro_batch_tokens // 2)
        self.step_config = replace(self.step_config, micro_batch_tokens=tokens)
        log.warning("micro-batches have at most %d tokens from here on", tokens)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # a loss scaler finds and skips these itself
            self.numbers.gradient(float(norm))
            return norm if self._finite(float(norm), "gradient norm") else torch.zeros_like(torch.as_tensor(norm))
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.meter.end()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finite(self, value: float, what: str) -> bool:
        """Whether it is; a window whose numbers are not is refused, or dropped: without gradients no step is taken."""
        finite = self.numbers.finite(value, what, self.state.global_step + 1, self._last_ids)
        if not finite:
            self.model.zero_grad(set_to_none=True)
        return finite

    def _not_finite_alone(self, ids: list[str]) -> list[str]:
        wanted, was_training = set(ids), self.model.training
        self.model.eval()
        rows = [row for row in self.rows if row["id"] in wanted]
        found = [
            row["id"] for row in rows if not math.isfinite(evaluate_loss(self.model, [row], self.step_config).loss_sum)
        ]
        self.model.train(was_training)
        return found

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the library's count needs a padded batch, and nobody reads it

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The exact mean loss over the validation rows' labelled tokens, and the metrics of generated answers.

        Leaves the random state as it was, so that evaluating never changes what is trained.
        """
        began, was_training = time.monotonic(), self.model.training
        self.model.eval()
        with torch.random.fork_rng():
            mine = list(self.validation)[distributed.rank() :: distributed.world()]
            evaluated = evaluate_loss(self.model, mine, self.step_config)
            self.step_config = evaluated.config
            sums = torch.tensor([evaluated.loss_sum, evaluated.count], dtype=torch.float64, device=self.args.device)
            loss, count = distributed.all_reduce(sums).tolist()
            mean = loss / max(1.0, count)
            metrics = {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0))}
            metrics |= gap(self.state.log_history, mean)
            if self.answers is not None:
                with self.step_config.forward_context():
                    metrics |= {f"eval_{name}": value for name, value in self.answers(self.model).items()}
        self.model.train(was_training)
        self.log({**metrics, "eval_seconds": time.monotonic() - began})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is saved when it is found, whatever the cadence of saving."""
        plan = self.flow.plan
        if plan.watched is None:
            return False
        if metrics.get("eval_stop_rate", 1.0) < plan.min_stop_rate:
            log.warning("too few answers stop by themselves (train.min_stop_rate): this is not a best checkpoint")
            return False
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.state.best_global_step = self.state.global_step
            self.control.should_save = self.control.should_save or plan.load_best
        return bool(is_best)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens/s to the line of a training step, counted over the steps since the last one."""
        if "train_runtime" in logs:
            return  # the library's closing line; ours is the summary
        if "loss" in logs:
            if self.numbers.skipped:
                logs = {**logs, "windows_skipped": len(self.numbers.skipped)}
            logs = {**logs, **self.meter.since_last()}
        super().log(logs, start_time)
