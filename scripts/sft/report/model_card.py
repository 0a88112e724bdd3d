"""The model card: README.md with the hub's header, from the comparison's figures and the run's own records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from sft.config import load
from sft.config.schema import PREFERENCES, Config
from sft.report.html import TEMPLATES, number

ADAPTER = "adapter"  # a form besides hf, gguf and ollama
_LIBRARIES = {ADAPTER: "peft", "hf": "transformers"}
_METHODS = {"qlora": "QLoRA", "lora": "LoRA"}
_NAMED_IF_SET = (  # settings of methods, besides those that each card has
    "model.add_tokens tuning.freeze tuning.lora.init tuning.lora.use_rslora tuning.lora.use_dora tuning.lora.bias"
    " tuning.lora.lora_plus_ratio tuning.lora.target_modules tuning.lora.layers_to_transform tuning.lora.rank_pattern"
    " tuning.lora.alpha_pattern tuning.lora.modules_to_save train.neftune_alpha train.objective train.normalize"
    " train.label_smoothing train.z_loss train.min_lr_ratio train.decay_ratio train.ewc data.weight_field"
).split()


def card(
    config: Config,
    name: str,
    form: str,
    *,
    result: Mapping[str, Any] | None = None,
    weights: str = "",
    system: str | None = None,
    exported: bool = False,
) -> str:
    """The card of a tuned model in one form: adapter, hf (a folder of safetensors), gguf or ollama.

    name: of the run. result: what `make compare` wrote, whose first comparison is this run's; None: not measured.
    weights: the GGUF file. system: the text that the training rows shared. exported: with a certificate of parity.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "repr": repr}
    seq2seq = result is not None and result["kind"] == "seq2seq"
    messages = [{"role": "system", "content": system}] if system else []
    return environment.get_template("model_card.md.j2").render(
        header=_header(config, name, form, result),
        title=config.experiment.name or name,
        description=config.experiment.description,
        what=_what(config, form) + (f", as a GGUF file ({weights})" if weights else ""),
        facts=_training(config, result["training"]) if result else {},
        train=config.train,
        messages=json.dumps([*messages, {"role": "user", "content": "Hello!"}], ensure_ascii=False),
        auto_class=f"Auto{'Peft' if form == ADAPTER else ''}ModelFor{'Seq2SeqLM' if seq2seq else 'CausalLM'}",
        tokens=config.generation.max_new_tokens,
        name=name, form=form, result=result, weights=weights, system=system, exported=exported, seq2seq=seq2seq,
    )  # fmt: skip


def _header(config: Config, name: str, form: str, result: Mapping[str, Any] | None) -> str:
    """The YAML between `---` that the hub reads; a base that is a local folder is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    base = config.model.name
    data = ModelCardData(
        base_model=None if load.is_model_folder(base) else base,
        library_name=_LIBRARIES.get(form, "gguf"),
        pipeline_tag="text2text-generation" if result and result["kind"] != "causal" else "text-generation",
        tags=["sft-play", "fine-tuned", *(["lora"] if form == ADAPTER else []), *config.experiment.tags],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation", dataset_type="own", dataset_name=f"{result['split']} split",
                metric_type=metric, metric_value=one["tuned"],
            )
            for metric, one in result["comparisons"][0]["metrics"].items()
        ] if result else None,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def _what(config: Config, form: str) -> str:
    base, lora = load.model_name(config.model.name), config.tuning.lora
    shape = f"r {lora.r}, alpha {lora.alpha}" + (f", began with {lora.init}" if lora.from_weights else "")
    if config.tuning.mode == "full":
        return f"`{base}` after a full fine-tune"
    if config.tuning.adapter == "prefix":
        return f"a prefix of {config.tuning.prefix_tokens} positions (prefix tuning) for `{base}`"
    method = _METHODS[config.tuning.mode]
    if form == ADAPTER:
        return f"a {method} adapter ({shape}) for `{base}`"
    return f"`{base}` with a {method} adapter ({shape}) merged into its weights"


def _training(config: Config, summary: Mapping[str, Any]) -> dict[str, Any]:
    """How it was trained; None for what is not known. summary: the run's finished.json."""
    train = config.train
    facts = {
        "epochs": summary.get("epochs"), "learning rate": train.learning_rate, "schedule": train.lr_scheduler_type,
        "rows a step": train.effective_batch, "longest row": f"{config.model.max_seq_len} tokens",
        "objective": train.objective + (f", beta {train.preference.beta}" if train.objective in PREFERENCES else ""),
        "labels": train.labels, "optimizer": train.optim, "seed": train.seed, "steps": summary.get("steps"),
        "best step": summary.get("best_step"), "tokens": summary.get("tokens"),
        "time": f"{summary['seconds']:.0f} s" if "seconds" in summary else None, "device": summary.get("device"),
        "peak memory": f"{summary['peak_memory_gib']} GiB" if "peak_memory_gib" in summary else None,
    }  # fmt: skip
    values = ((name, attrgetter(name)) for name in _NAMED_IF_SET)
    facts |= {name: value(config) for name, value in values if value(config) != value(Config())}
    if config.tuning.adapter_path:
        facts["went on from"] = Path(config.tuning.adapter_path).name
    return facts
