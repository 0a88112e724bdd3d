"""The loop: transformers' Trainer, whose batch is a whole window and whose checkpoints are whole or not there.

Plain Trainer for causal and seq2seq models alike: the window leaves TRL's SFTTrainer and Seq2SeqTrainer nothing to do.
Only methods are overridden: the order of rows, one step, evaluation, and what is written and read back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback

from sft import files
from sft.errors import EnvironmentProblem, RunError
from sft.runs import step_of
from sft.step.microbatch import backward_window
from sft.step.recovery import CarefulOptimizer, out_of_memory, release
from sft.step.window import Collator, labelled
from sft.training import checkpoints, ranks, rng, weights, windows
from sft.training.checkpoints import Keeper, Snapshot
from sft.training.flow import Flow
from sft.training.numbers import Numbers, gap
from sft.training.recipe import Recipe, losses
from sft.training.rehearsal import is_checkpointing

log = logging.getLogger("sft.training")
Answers = Callable[[Any], dict[str, float]]


class WindowTrainer(Trainer):  # type: ignore[misc]
    """Trains `model` on `rows` (features with `id`, `input_ids`, `labels`), one window a step.

    answers: generates from a sample of validation rows and gives their metrics, or None.
    """

    control: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        rows: Sequence[windows.Feature],
        validation: Sequence[windows.Feature],
        *,
        effective_batch: int,
        recipe: Recipe,
        keeper: Keeper,
        flow: Flow,
        answers: Answers | None = None,
        callbacks: Sequence[Any] = (),
        on_nan: str = "stop",
    ) -> None:
        self.numbers = Numbers(on_nan, keeper.run, self._not_finite_alone)
        super().__init__(model=model, args=args, train_dataset=rows, callbacks=[flow, self.numbers, *callbacks])
        self.pop_callback(PrinterCallback)
        self.pop_callback(DefaultFlowCallback)
        self.rows, self.validation, self.recipe, self.keeper, self.flow = rows, validation, recipe, keeper, flow
        self.effective_batch, self.answers = effective_batch, answers
        self.tokens, self.labelled, self.seconds = 0, 0, 0.0
        self.waited = 0.0  # seconds between steps in which the input was waited for
        self._read_at: tuple[int, float, float] = (0, 0.0, 0.0)
        self._step_began: float | None = None
        self._last_ids: list[str] = []

    def get_train_dataloader(self) -> Any:
        order = windows.Windows(
            len(self.rows), self.effective_batch, self.args.seed, rank=ranks.rank(), world=ranks.world()
        )
        pin = self.args.device.type == "cuda"
        return windows.loader(self.rows, order, Collator(self.recipe.kind), pin=pin)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The next window. What it costs stands in the log as `input_wait`, a share of the time of steps."""
        asked = time.monotonic()
        self._step_began = None
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += (self._step_began or time.monotonic()) - asked
        return found

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Losses of the window over all ranks: what its gradient is divided by. Counts its tokens on the way."""
        self._step_began = time.monotonic()
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            if "labels" in batch:
                tokens = sum(int(batch[key].sum()) for key in ("lengths", "source_lengths") if key in batch)
                counts += torch.tensor([labelled(batch), tokens], device=device)
        taken, tokens = (int(count) for count in ranks.total(counts))
        if not taken:
            log.warning("step %d has no labelled token: nothing is learnt from it", self.state.global_step + 1)
        self.labelled += taken
        self.tokens += tokens
        return max(1, taken)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one window; returns its mean loss over all ranks' labelled tokens."""
        self.model.train()
        device = self.args.device
        batch = {key: value.to(device, non_blocking=True) for key, value in inputs.items() if key != "ids"}
        self._last_ids = inputs["ids"]
        loss = torch.zeros((), device=self.args.device)
        if batch:
            with self.recipe.computing():
                loss = backward_window(
                    self.model,
                    batch,
                    tokens=self.recipe.tokens,
                    rows=self.recipe.rows,
                    apart=self.recipe.apart,
                    normaliser=num_items_in_batch,
                    backward=self.accelerator.backward,
                    logits=self.recipe.logits,
                    tile=self.recipe.tile,
                    label_smoothing=self.recipe.label_smoothing,
                    on_budget=self.recipe.lower,
                )
        ranks.sum_gradients(self.model.parameters())
        loss = ranks.total(loss.detach().float())
        if not self._finite(float(loss), "loss"):
            return loss.new_tensor(self.numbers.last)
        self.numbers.last = float(loss)
        return loss

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.optimizer = CarefulOptimizer(self.optimizer, self._halve_budget)
        return prepared

    def _halve_budget(self) -> None:
        self.recipe.lower(max(1, self.recipe.tokens // 2))
        log.warning("micro-batches have at most %d tokens from here on", self.recipe.tokens)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # a loss scaler finds and skips these itself
            self.numbers.gradient(float(norm))
            return norm if self._finite(float(norm), "gradient norm") else torch.zeros_like(torch.as_tensor(norm))
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._step_began is not None:
            self.seconds += time.monotonic() - self._step_began
            self._step_began = None
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
        found = [row["id"] for row in rows if not math.isfinite(float(losses(self.model, [row], self.recipe)[0]))]
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
            mine = list(self.validation)[ranks.rank() :: ranks.world()]
            loss, count = ranks.total(losses(self.model, mine, self.recipe)).tolist()
            mean = loss / max(1.0, count)
            metrics = {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0))}
            metrics |= gap(self.state.log_history, mean)
            if self.answers is not None:
                with self.recipe.computing():
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
            now = (self.tokens, self.seconds, self.waited)
            tokens, seconds, waited = (new - old for new, old in zip(now, self._read_at, strict=True))
            self._read_at = now
            logs = {**logs, "tokens_per_second": tokens / max(seconds, 1e-9)}
            logs["input_wait"] = waited / max(seconds + waited, 1e-9)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        states = ranks.everywhere(rng.state())
        scaler = self.accelerator.scaler
        snapshot = Snapshot(
            step=self.state.global_step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler.state_dict(),
            rng=states,
            trainer_state=lambda path: self.state.save_to_json(str(path)),
            session=self._session(),
            scaler=None if scaler is None else scaler.state_dict(),
        )
        ranks.first(lambda: self._write(snapshot))  # a disk that refuses rank 0 stops every rank

    def _write(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint; once more when memory ran out while it was gathered."""
        try:
            checkpoints.save(self.keeper, snapshot, self.state.best_global_step)
            return
        except (EnvironmentProblem, RuntimeError, MemoryError) as error:
            if not (out_of_memory(error) or out_of_memory(error.__cause__)):
                raise
        release()
        log.warning("out of memory while saving: once more, with all that can be spared released")
        checkpoints.save(self.keeper, snapshot, self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights.load(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        checkpoints.take_up(folder, self.optimizer, self.lr_scheduler, self.args.learning_rate)
        self._take_up_session(checkpoints.read(folder, checkpoints.SESSION))

    def _session(self) -> dict[str, Any]:
        counts = {"tokens": self.tokens, "labelled": self.labelled, "seconds": self.seconds}
        return {
            **counts,
            "asked_budget": self.recipe.asked,
            "budget": self.recipe.budget,
            "evaluating": self.recipe.evaluating,
            "checkpointing": is_checkpointing(self.model),
            "skipped": self.numbers.skipped,
            "last_loss": self.numbers.last,
        }

    def _take_up_session(self, session: dict[str, Any]) -> None:
        self.tokens, self.labelled, self.seconds = session["tokens"], session["labelled"], session["seconds"]
        self._read_at = (self.tokens, self.seconds, self.waited)
        self.numbers.skipped, self.numbers.last = session.get("skipped", []), session.get("last_loss", 0.0)
        if session["asked_budget"] == self.recipe.asked:
            self.recipe.lower(session["budget"][0])  # what fitted then, if memory ran out
            self.recipe.evaluating = session.get("evaluating")
        else:
            log.info("the micro-batches are cut otherwise than before: same steps, last bits may differ from here on")

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoints.read(Path(checkpoint), checkpoints.SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved = checkpoints.read(Path(checkpoint), checkpoints.RNG)
            rng.restore(saved[ranks.rank()])

    def fit(self, checkpoint: Path | None) -> None:
        """Trains to the end of the plan, or until the watch stops it; a checkpoint that is the end trains no more."""
        if checkpoint is not None:
            self._set_aside_later(step_of(checkpoint))
            state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
            if self.flow.complete(state):
                self._load_from_checkpoint(str(checkpoint))
                self._take_up_session(checkpoints.read(checkpoint, checkpoints.SESSION))
                self.state = state
                return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.flow.watch)
            try:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except RuntimeError as error:
                if not ranks.lost(error):
                    raise
                raise RunError(
                    f"another process of this run is gone ({' '.join(str(error).split())[:120]})",
                    where=f"after step {self.state.global_step}",
                    mend="run the same command: it takes up the newest checkpoint",
                ) from error

    def _set_aside_later(self, step: int) -> None:
        """Moves checkpoints of later steps out of the way: they belong to a past that is being left."""
        ranks.first(partial(checkpoints.set_aside, self.keeper.run, step))

    def take_best(self) -> int | None:
        """Puts the best checkpoint's weights into the model; returns its step, None where the last ones stay."""
        best = self.state.best_global_step
        if not self.flow.plan.load_best or best is None or best == self.state.global_step:
            return best if self.flow.plan.load_best else None
        folder = checkpoints.folder_of(self.keeper.run, best)
        if problem := files.manifest_problem(folder):
            log.warning("the best checkpoint, %s, cannot be used (%s): the last step stays", folder.name, problem)
            return None
        weights.load(self.model, folder)
        return int(best)
