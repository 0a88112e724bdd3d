"""What the trainer writes so that a run can go on, and what it reads back: exactly where it was, or where it ends."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState

from sft.errors import EnvironmentProblem, RunError
from sft.model import kernels
from sft.runs import step_of
from sft.step.step import StepConfig, out_of_memory, release_memory
from sft.training import checkpoint as checkpoints
from sft.training import checkpoint as weights
from sft.training import distributed
from sft.training.best import Best, standing
from sft.training.checkpoint import CheckpointManager, TrainState
from sft.training.flow import Flow
from sft.training.meter import Meter
from sft.training.numbers import Numbers
from sft.training.rehearsal import is_checkpointing

log = logging.getLogger("sft.training")


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are whole or not there, and hold all that its next step depends on."""

    control: Any
    optimizer: Any
    step_config: StepConfig
    asked_budget: list[Any]
    keeper: CheckpointManager
    flow: Flow
    numbers: Numbers
    meter: Meter
    lost_best: Best | None = None  # the best evaluation, where its checkpoint was damaged

    def fit(self, checkpoint: Path | None) -> None:
        """Trains to the end of the plan, or until the watch stops it; a checkpoint that is the end trains no more."""
        if checkpoint is not None:
            distributed.on_rank0(partial(checkpoints.archive_newer, self.keeper.run, step_of(checkpoint)))
            state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
            if self.flow.complete(state):
                self._load_from_checkpoint(str(checkpoint))
                self._take_up_session(checkpoints.read_state(checkpoint, checkpoints.SESSION))
                self.state = state
                return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.flow.watch)
            try:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except RuntimeError as error:
                if not distributed.lost(error):
                    raise
                raise RunError(
                    f"another process of this run is gone ({' '.join(str(error).split())[:120]})",
                    where=f"after step {self.state.global_step}",
                    fix="run the same command: it takes up the newest checkpoint",
                ) from error

    def take_best(self) -> int | None:
        """Puts the best weights that are left into the model; returns their step, None where the last ones stay."""
        if not self.flow.plan.load_best:
            return None
        kept = self._standing()
        if kept is not None and kept.step != self.state.global_step:
            weights.load_weights(self.model, checkpoints.folder_of(self.keeper.run, kept.step))
        return kept.step if kept else None

    def _standing(self) -> Best | None:
        step, history = self.state.global_step, self.state.log_history
        kept, self.lost_best = distributed.on_rank0(
            partial(standing, history, self.flow.plan, self.keeper.run, now=step)
        )
        return kept

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        states = distributed.all_gather(checkpoints.random_state())
        scaler = self.accelerator.scaler
        snapshot = TrainState(
            step=self.state.global_step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler.state_dict(),
            rng=states,
            trainer_state=lambda path: self.state.save_to_json(str(path)),
            session=self._session(),
            scaler=None if scaler is None else scaler.state_dict(),
        )
        distributed.on_rank0(lambda: self._write(snapshot))  # a disk that refuses rank 0 stops every rank

    def _write(self, snapshot: TrainState) -> None:
        """Writes a checkpoint; once more when memory ran out while it was gathered."""
        try:
            checkpoints.save_checkpoint(self.keeper, snapshot, self.state.best_global_step)
            return
        except (EnvironmentProblem, RuntimeError, MemoryError) as error:
            if not (out_of_memory(error) or out_of_memory(error.__cause__)):
                raise
        release_memory()
        log.warning("out of memory while saving: once more, with all that can be spared released")
        checkpoints.save_checkpoint(self.keeper, snapshot, self.state.best_global_step)

    def _session(self) -> dict[str, Any]:
        return {
            **self.meter.state(),
            "asked_budget": self.asked_budget,
            "budget": self.step_config.budget,
            "evaluating": self.step_config.eval_tokens,
            "checkpointing": is_checkpointing(self.model),
            "kernels": kernels.kernels_of(self.model),
            "skipped": self.numbers.skipped,
            "last_loss": self.numbers.last,
            "unlogged": [float(self._tr_loss), self._globalstep_last_logged],
            "best": self.state.best_global_step if self.flow.plan.load_best else None,
        }

    def _take_up_session(self, session: dict[str, Any]) -> None:
        self.meter.restore(session)
        self.numbers.skipped, self.numbers.last = session.get("skipped", []), session.get("last_loss", 0.0)
        if session["asked_budget"] == self.asked_budget:
            self.step_config = replace(  # what fitted then, if memory ran out
                self.step_config, micro_batch_tokens=session["budget"][0], eval_tokens=session.get("evaluating")
            )
        else:
            log.info("the micro-batches are cut otherwise than before: same steps, last bits may differ from here on")
        was, now = session.get("kernels", kernels.PLAIN), kernels.kernels_of(self.model)
        if was != now:
            log.info("layers were computed %s and are now %s: same steps, last bits may differ from here on", was, now)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        checkpoints.restore_optimizer(folder, self.optimizer, self.lr_scheduler, self.args.learning_rate)
        self._take_up_session(checkpoints.read_state(folder, checkpoints.SESSION))
        if self.flow.plan.load_best:  # what later evaluations must beat is what can still be loaded
            kept = self._standing()
            self.state.best_global_step = kept.step if kept else None
            self.state.best_metric = kept.value if kept else None

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoints.read_state(Path(checkpoint), checkpoints.SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last thing read back, after the loop has begun to count the losses of a line of the log anew."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        checkpoints.restore_random(checkpoints.read_state(folder, checkpoints.RNG)[distributed.rank()])
        if unlogged := checkpoints.read_state(folder, checkpoints.SESSION).get("unlogged"):
            self._tr_loss = torch.tensor(unlogged[0], device=self.args.device)
            self._globalstep_last_logged = unlogged[1]
