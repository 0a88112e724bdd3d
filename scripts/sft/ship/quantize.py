"""K-quants of a GGUF file (q4_k_m, q5_k_m, q6_k) by llama.cpp's own code, where llama-cpp-python is installed."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sft.errors import ModelError
from sft.ship.verify import Sample

TYPES = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}  # TYPE= -> llama.cpp's name
SOURCE = "f16"  # the type that is written and checked first


def is_installed() -> bool:
    """Whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def quantize(source: Path, target: Path, kind: str) -> None:
    """Writes the GGUF file `source` as `kind` to `target`. Raises ModelError if llama.cpp cannot."""
    llama = _llama_cpp()
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{TYPES[kind]}")
    if code := llama.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise ModelError(f"llama.cpp cannot write {target.name} (code {code})", fix="--type q8_0, or --type f16")


def loss(path: Path, sample: Sample) -> float:
    """The mean cross-entropy in nats of the sample's labelled tokens, in llama.cpp on the CPU."""
    length = max(len(row.input_ids) for row in sample.rows)
    model = _llama_cpp().Llama(str(path), n_ctx=length, n_batch=length, n_gpu_layers=0, logits_all=True, verbose=False)
    logits = []
    for row in sample.rows:
        model.reset()
        model.eval(row.input_ids)
        logits.append(torch.from_numpy(model.scores[: len(row.input_ids)].copy()))
    return sample.loss(logits)


def _llama_cpp() -> Any:
    """llama_cpp without its log, which would go to stderr."""
    llama = importlib.import_module("llama_cpp")
    llama.llama_log_set(_silent_log(llama), None)
    return llama


@cache
def _silent_log(llama: Any) -> Any:  # cached, because llama.cpp holds only a pointer to it
    return llama.llama_log_callback(lambda level, text, data: None)
