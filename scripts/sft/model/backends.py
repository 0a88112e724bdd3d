"""The library that trains adapters: bitsandbytes with peft, or unsloth where it can be imported and there is a GPU.

unsloth patches transformers when it is imported, so it must come first: `train` calls `prepare` before anything else.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sft.config.schema import LoraSection
from sft.errors import ModelError, one_line
from sft.model import hardware

if TYPE_CHECKING:
    import torch

    from sft.config.schema import ModelSection, TuningSection
    from sft.model.files import ModelFiles

log = logging.getLogger("sft.model")


@dataclass(frozen=True)
class Backend:
    """The backend that is used; `reason` says why it is not the configured one, None if it is."""

    name: Literal["bnb", "unsloth"]
    reason: str | None = None


def choose(tuning: TuningSection, *, cuda: bool, kind: str = "causal") -> Backend:
    """The backend for this machine. unsloth falls back to bnb where it is not installed, lacks a setting, or there
    is no CUDA GPU.
    """
    if tuning.backend == "bnb":
        return Backend("bnb")
    if not cuda:
        return Backend("bnb", "there is no CUDA GPU")
    if kind != "causal":
        return Backend("bnb", "unsloth trains only decoder-only models")
    ours = {"adapter: prefix": tuning.adapter == "prefix", "freeze": tuning.freeze, "adapter_path": tuning.adapter_path}
    if named := [key for key, is_set in ours.items() if is_set]:
        return Backend("bnb", f"it has no tuning.{named[0]}")
    plain = {"target_modules", "r", "alpha", "dropout", "bias", "use_rslora", "modules_to_save", "lora_plus_ratio"}
    if others := [name for name, value in LoraSection() if name not in plain and getattr(tuning.lora, name) != value]:
        return Backend("bnb", f"it has no tuning.lora.{others[0]}")
    if importlib.util.find_spec("unsloth") is None:
        return Backend("bnb", "it is not installed (make install-unsloth)")
    return Backend("unsloth")


def prepare(tuning: TuningSection, *, kind: str = "causal") -> Backend:
    """Chooses the backend and, for unsloth, imports it before transformers; logs once why it falls back, if it does.

    Call it before transformers is imported. Raises nothing for a broken unsloth: that is a reason to fall back.
    """
    backend = choose(tuning, cuda=bool(hardware.gpus()), kind=kind)
    if backend.name == "unsloth":
        # XFormers' wheels often fit another torch, and SDPA is as good
        for name in ("XFORMERS_DISABLED", "XFORMERS_FORCE_DISABLE_TRITON", "UNSLOTH_DISABLE_STATISTICS"):
            os.environ.setdefault(name, "1")
        try:
            importlib.import_module("unsloth")
        except Exception as error:  # unsloth raises anything at import: a wrong CUDA, torch or driver
            backend = Backend("bnb", f"importing it fails: {type(error).__name__}: {one_line(error, 200)}")
    if backend.reason:
        log.warning(f"tuning.backend is unsloth, but {backend.reason}: training with bnb instead")
    return backend


def load_unsloth(
    files: ModelFiles, model: ModelSection, tuning: TuningSection, dtype: torch.dtype, *, gradient_checkpointing: bool
) -> Any:
    """The base with adapters, loaded by unsloth. Untested if there is no CUDA GPU. Raises ModelError."""
    from unsloth import FastLanguageModel

    from sft.model import adapters, load

    if model.add_tokens:
        raise ModelError("unsloth trains no new tokens here", where="model.add_tokens", fix="--set tuning.backend=bnb")
    full = tuning.mode == "full"
    try:
        base, _ = FastLanguageModel.from_pretrained(
            model_name=str(files.path),
            max_seq_length=model.max_seq_len,
            dtype=dtype,
            load_in_4bit=tuning.mode == "qlora",
            full_finetuning=full,
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
        )
        load.mark(base, files)
        if full:
            return base
        lora = tuning.lora
        return FastLanguageModel.get_peft_model(
            base,
            r=lora.r,
            target_modules=adapters.targets(base, lora),
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            bias=lora.bias,
            use_rslora=lora.use_rslora,
            modules_to_save=lora.modules_to_save or None,
            use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
            max_seq_length=model.max_seq_len,
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        what = f"unsloth cannot load {files.name}: {one_line(error)}"
        raise ModelError(what, where="tuning.backend", fix="--set tuning.backend=bnb") from None
