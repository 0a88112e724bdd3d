"""The sections `model` and `tuning`: which weights, and how they are changed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.config.schema.base import Auto, Section


class ModelSection(Section):
    """Which base model, and how long its rows may be."""

    name: str = Field(
        "Qwen/Qwen2.5-3B-Instruct", min_length=1, description="A hub id, or a folder (an existing folder wins)."
    )
    revision: str | None = Field(None, description="The hub revision (branch, tag or commit); null is the default one.")
    type: Literal["auto", "causal", "seq2seq"] = Field(
        "auto", description="Decoder-only or encoder-decoder; `auto` reads it from the model's config.json."
    )
    max_seq_len: int = Field(
        512, ge=8, description="Longest row in tokens; a longer one is handled by `model.over_length`."
    )
    over_length: Literal["truncate_left", "truncate_right", "drop", "split_turns", "error"] = Field(
        "truncate_left",
        description="A row over `max_seq_len`: cut the oldest prompt tokens (the answer and its end stay), cut the"
        " answer's tail (its end token stays), drop the row and name it, cut a conversation between its turns into rows"
        " that fit, or stop with an error.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Said loudly when true.")
    device_map: str = Field("auto", description="`auto`: the GPU where there is one, else the CPU; or `cpu`, `cuda:0`.")
    attn_implementation: str = Field(
        "auto", description="`auto`: rows kept apart without padding where the hardware has it, else `sdpa`; or a name."
    )


class LoraSection(Section):
    """The adapter's shape."""

    r: int = Field(16, ge=1, description="Rank of the adapter's matrices.")
    alpha: int = Field(32, ge=1, description="Scale: the adapter's output is multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: Auto | list[str] = Field(
        "auto", description="`auto`: every linear layer but the head, found in the model; or a list of module names."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    use_rslora: bool = Field(False, description="Rank-stabilised LoRA: scale alpha / sqrt(r).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (DoRA).")
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules trained whole and saved with the adapter, e.g. [embed_tokens]."
    )


class TuningSection(Section):
    """How the weights are changed, and by whose kernels."""

    backend: Literal["bnb", "unsloth"] = Field(
        "bnb", description="`unsloth` falls back to `bnb`, and says why, where it cannot be used."
    )
    mode: Literal["qlora", "lora", "full"] = Field(
        "qlora", description="4-bit base with adapters, 16-bit base with adapters, or every weight."
    )
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapter's shape.")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format of a QLoRA base.")
    double_quant: bool = Field(True, description="Quantise the quantisation constants too (saves 0.4 bit a weight).")
