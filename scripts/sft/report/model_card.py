"""The model card: README.md with the hub's header, from the comparison's figures and the run's own records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from sft.config import load
from sft.config.schema import PREFERENCES, Config
from sft.report.html import number

ADAPTER, SAFETENSORS = "adapter", "hf"  # forms of a model besides gguf and ollama
_LIBRARIES = {ADAPTER: "peft", SAFETENSORS: "transformers"}
_METHODS = {"qlora": "QLoRA", "lora": "LoRA"}
_NAMED_IF_SET = (  # settings of methods, besides those that each card has
    "model.add_tokens tuning.freeze tuning.lora.init tuning.lora.use_rslora tuning.lora.use_dora tuning.lora.bias"
    " tuning.lora.lora_plus_ratio tuning.lora.target_modules tuning.lora.layers_to_transform tuning.lora.rank_pattern"
    " tuning.lora.alpha_pattern tuning.lora.modules_to_save train.neftune_alpha train.objective train.normalize"
    " train.label_smoothing train.z_loss train.min_lr_ratio train.decay_ratio train.ewc data.weight_field"
).split()


def form_of_run(config: Config) -> str:
    """The form of what training left."""
    return SAFETENSORS if config.tuning.mode == "full" else ADAPTER


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
    description = config.experiment.description
    certificate = "`parity.json` proves that this form gets the same tokens as in training.\n"
    seq2seq = result is not None and result["kind"] == "seq2seq"
    parts = [
        _header(config, name, form, result),
        f"# {config.experiment.name or name}\n",
        f"{description}\n" if description else "",
        _about(config, form, weights),
        certificate if exported else "",
        _measured(result, config) if result else "Its quality was not measured; `make compare` does so.\n",
        _use(config, name, form, weights, system, seq2seq=seq2seq),
    ]
    return "\n".join(part for part in parts if part)


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


def _about(config: Config, form: str, weights: str) -> str:
    base, lora = load.model_name(config.model.name), config.tuning.lora
    shape = f"r {lora.r}, alpha {lora.alpha}" + (f", began with {lora.init}" if lora.from_weights else "")
    if config.tuning.mode == "full":
        what = f"`{base}` after a full fine-tune"
    elif config.tuning.adapter == "prefix":
        what = f"a prefix of {config.tuning.prefix_tokens} positions (prefix tuning) for `{base}`"
    elif form == ADAPTER:
        what = f"a {_METHODS[config.tuning.mode]} adapter ({shape}) for `{base}`"
    else:
        method = _METHODS[config.tuning.mode]
        what = f"`{base}` with a {method} adapter ({shape}) merged into its weights"
    return f"This is {what}{f', as a GGUF file ({weights})' if weights else ''}, made with sft-play.\n"


def _measured(result: Mapping[str, Any], config: Config) -> str:
    compared = result["comparisons"][0]
    parts = [
        "## Evaluation\n",
        f"**{compared['verdict']['headline']}**: {compared['verdict']['words']}.\n",
        f"Measured {result['at']} on what training left, before any merge or conversion.\n",
        _metrics(compared),
        _limits(compared),
        _training(result, config),
        _data(result, config),
    ]
    return "\n".join(part for part in parts if part)


def _metrics(compared: Mapping[str, Any]) -> str:
    lines = [
        "| metric | base | tuned | difference | 95 % interval | won / tied / lost | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in compared["metrics"].items():
        lines.append(
            f"| {name} | {number(one['base'])} | {number(one['tuned'])} | {one['difference']:+.4f} |"
            f" {one['low']:+.4f} to {one['high']:+.4f} | {one['wins']} / {one['ties']} / {one['losses']} |"
            f" {one['finding']} |"
        )
    return "\n".join(lines) + "\n"


def _limits(compared: Mapping[str, Any]) -> str:
    lines = ["## Limits\n", f"- {compared['stopping']['headline']}."]
    findings = [compared[name] for name in ("general", "constant_baseline") if compared.get(name)]
    lines += [f"- {finding['headline']}: {finding['words']}." for finding in findings]
    lines.append("- Measured on held-out rows of its own data; other questions were not tried.")
    return "\n".join(lines) + "\n"


def _training(result: Mapping[str, Any], config: Config) -> str:
    train, summary = config.train, result["training"]
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
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"## Training\n\n| | |\n|---|---|\n{rows}\n\nVersions: {versions}.\n"


def _data(result: Mapping[str, Any], config: Config) -> str:
    processed, ledger = result["data"].get("processed", {}), result["data"].get("run", {})
    lines = []
    if processed:
        named = ", ".join(f"{count:,} {reason}" for reason, count in processed.get("named", {}).items())
        lines.append(
            f"{processed['rows_read']:,} rows read, {processed['rows_written']:,} used"
            + (f"; left out: {named}." if named else ".")
        )
    if trained := ledger.get("train"):
        lines.append(
            f"Trained on {trained['rows_trained']:,} of {trained['rows_read']:,} rows, "
            f"{trained['labelled_tokens']:,} of {trained['tokens']:,} tokens in the loss."
        )
    if rehearsed := ledger.get("rehearsal"):
        lines.append(
            f"Rehearsed beside them: {rehearsed['rows_trained']:,} general questions with the base's own answers,"
            f" {config.train.rehearsal.share:.0%} of the tokens in the loss."
        )
    if general := ledger.get("ewc"):
        lines.append(
            f"Elastic weight consolidation of strength {config.train.ewc.strength:g}, from the base's answers to"
            f" {general['rows_trained']:,} general questions."
        )
    return "## Data\n\n" + "\n".join(lines) + "\n" if lines else ""


_PYTHON = """\
from {library} import {auto_class}
from transformers import AutoTokenizer

folder = "THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
messages = {messages}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens={tokens})
print(tokenizer.decode({answer}, skip_special_tokens=True))
"""


def _use(config: Config, name: str, form: str, weights: str, system: str | None, *, seq2seq: bool) -> str:
    """How to run this form."""
    shared = [{"role": "system", "content": system}] if system else []
    messages = json.dumps([*shared, {"role": "user", "content": "Hello!"}], ensure_ascii=False)
    if form == "gguf":
        note = f"\nThe training rows shared this system text: {system!r}.\n" if system else ""
        return f"## Use\n\n```bash\nllama-server -m {weights} --jinja\n```\n{note}"
    if form == "ollama":
        return f"## Use\n\n```bash\nollama create {name} -f Modelfile\nollama run {name}\n```\n"
    code = _PYTHON.format(
        library="peft" if form == ADAPTER else "transformers",
        auto_class=f"Auto{'Peft' if form == ADAPTER else ''}ModelFor{'Seq2SeqLM' if seq2seq else 'CausalLM'}",
        messages=messages,
        tokens=config.generation.max_new_tokens,
        answer="output[0]" if seq2seq else 'output[0, inputs["input_ids"].shape[1] :]',
    )
    return f"## Use\n\n```python\n{code}```\n"
