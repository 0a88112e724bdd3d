"""Everything a run needs before any weight is loaded: model files, backend, rows, settings. Faults show here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft import runs
from sft.config import auto
from sft.config.load import Loaded
from sft.config.schema import Config, TrainSection
from sft.data import store
from sft.errors import ConfigError
from sft.model import backends, hardware, hub
from sft.model.backends import Backend
from sft.model.files import ModelFiles
from sft.training import plan

# transformers is imported below, in functions: unsloth, where it is used, must be imported before it


@dataclass(frozen=True)
class Job:
    """A run that could begin: the resolved config with the reason of each settled value, its rows, its steps.

    asked: the section `train` as it was before its `auto`s were settled.
    """

    config: Config
    asked: TrainSection
    reasons: dict[str, str]
    files: ModelFiles
    backend: Backend
    device: hardware.Hardware
    tokenizer: Any
    template: Any
    encoder: Any
    rows: Any
    plan: plan.Plan

    def stamp(self) -> dict[str, Any]:
        """What checkpoints of this run depend on; see `stamp.check`."""
        from sft.training import distributed

        train, tuning = self.config.train, self.config.tuning
        lora = tuning.lora.model_dump() if tuning.mode != "full" else None
        return {
            "backend": self.backend.name,
            "base_model": self.files.name,
            "revision": self.files.revision,
            "weights": self.files.fingerprint(),
            "kind": self.files.kind,
            "mode": tuning.mode,
            "lora": lora,
            "precision": "bf16" if train.bf16 else "fp16" if train.fp16 else "fp32",
            "template": self.template.digest,
            "data": self.rows.hashes,
            "max_seq_len": self.config.model.max_seq_len,
            "labels": train.labels,
            "seed": train.seed,
            "effective_batch": train.effective_batch,
            "world_size": distributed.world(),
            "total_steps": self.plan.total_steps,
            "learning_rate": train.learning_rate,
            "lr_scheduler_type": train.lr_scheduler_type,
            "warmup_steps": self.plan.warmup_steps,
            "weight_decay": train.weight_decay,
            "optim": train.optim,
            "max_grad_norm": train.max_grad_norm,
            "label_smoothing": train.label_smoothing,
        }


def prepare(
    loaded: Loaded,
    root: Path,
    on_progress: Callable[[int, int], None] | None = None,
    checkpoint: Path | None = None,
) -> Job:
    """Reads, checks and resolves; loads no weights, writes only the cache. Raises the SftError of what is wrong.

    checkpoint: the one that training resumes from; its date is used again in templates that print the date.
    """
    from sft.chat.template import fix_date

    config = fix_date(loaded.config, runs.run_of_adapter(checkpoint) if checkpoint else None)
    files = hub.find(config.model, root, weights=True)
    backend = backends.prepare(config.tuning, kind=files.kind)
    stage = store.resolve_stage(config.data, root)

    from sft import metrics
    from sft.chat import dataset
    from sft.chat.encode import encoder_for
    from sft.model.tokenizer import load_tokenizer
    from sft.training import rows

    metrics.check_names(config.eval.metrics)
    tokenizer = load_tokenizer(files, trust_remote_code=config.model.trust_remote_code)
    encoder = encoder_for(config, tokenizer, files.kind, root)
    questions = config.eval.train_sample if config.train.eval_strategy != "no" else 0
    found = rows.read(stage, encoder, questions=questions, cache=root / dataset.FOLDER, on_progress=on_progress)
    device = _device(config)
    facts = auto.Facts(
        device=device.device,
        capability=device.capability,
        parameters=files.parameters,
        train_rows=len(found.train),
        seq2seq=files.kind == "seq2seq",
        bf16_supported=device.bf16,
    )
    resolved = auto.resolve(config, facts)
    steps = plan.make(resolved.config, len(found.train), validation=bool(found.validation))
    return Job(
        config=resolved.config,
        asked=config.train,
        reasons=resolved.reasons,
        files=files,
        backend=backend,
        device=device,
        tokenizer=tokenizer,
        template=encoder.template,
        encoder=encoder,
        rows=found,
        plan=steps,
    )


def _device(config: Config) -> hardware.Hardware:
    found = hardware.probe()
    wanted = config.model.device_map
    if wanted == "cpu":
        return replace(found, device="cpu", name="the CPU", capability=None, bf16=True, count=1)
    if wanted.startswith("cuda") and found.device != "cuda":
        raise ConfigError(
            f"model.device_map is {wanted}, and there is no CUDA GPU",
            where="model.device_map",
            fix="--set model.device_map=auto",
        )
    return found
