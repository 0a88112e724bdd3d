"""The model card: README.md with the hub's header, from the comparison's figures and the run's own records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.config import load
from sft.config.schema import Config
from sft.generation.load import Target
from sft.report.html import number


def card(result: Mapping[str, Any], compared: Mapping[str, Any], config: Config) -> str:
    """The card of one tuned model. result: the whole comparison. compared: this model's part of it."""
    title = config.experiment.name or compared["name"]
    parts = [
        header(result, compared, config),
        f"# {title}\n",
        f"{config.experiment.description}\n" if config.experiment.description else "",
        _about(result, config),
        "## Evaluation\n",
        f"**{compared['verdict']['headline']}**: {compared['verdict']['words']}.\n",
        _metrics(compared),
        _limits(compared),
        _training(result, config),
        _data(result),
        _use(config),
    ]
    return "\n".join(part for part in parts if part)


def header(result: Mapping[str, Any], compared: Mapping[str, Any], config: Config) -> str:
    """The YAML between `---` that the hub reads; a base that is a local folder is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    base, adapter = config.model.name, config.tuning.mode != "full"
    data = ModelCardData(
        base_model=None if load.is_model_folder(base) else base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation" if result["kind"] == "causal" else "text2text-generation",
        tags=["sft-play", "fine-tuned", *(["lora"] if adapter else []), *config.experiment.tags],
        model_name=compared["name"],
        eval_results=[
            EvalResult(
                task_type="text-generation", dataset_type="own", dataset_name=f"{result['split']} split",
                metric_type=name, metric_value=one["tuned"],
            )
            for name, one in compared["metrics"].items()
        ],
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def _about(result: Mapping[str, Any], config: Config) -> str:
    base, tuning = load.model_name(config.model.name), config.tuning
    how = {"qlora": "a QLoRA adapter", "lora": "a LoRA adapter", "full": "a full fine-tune"}[tuning.mode]
    rank = f" (r {tuning.lora.r}, alpha {tuning.lora.alpha})" if tuning.mode != "full" else ""
    return f"This is {how}{rank} of `{base}`, made with sft-play. Measured {result['at']}.\n"


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
        "epochs": train.epochs, "learning rate": train.learning_rate, "schedule": train.lr_scheduler_type,
        "rows a step": train.effective_batch, "longest row": f"{config.model.max_seq_len} tokens",
        "labels": train.labels, "seed": train.seed, "steps": summary.get("steps"),
        "tokens": summary.get("tokens"), "time": f"{summary['seconds']:.0f} s" if "seconds" in summary else None,
        "device": summary.get("device"),
        "peak memory": f"{summary['peak_memory_gib']} GiB" if "peak_memory_gib" in summary else None,
    }  # fmt: skip
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"## Training\n\n| | |\n|---|---|\n{rows}\n\nVersions: {versions}.\n"


def _data(result: Mapping[str, Any]) -> str:
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
    return "## Data\n\n" + "\n".join(lines) + "\n" if lines else ""


def _use(config: Config) -> str:
    if config.tuning.mode == "full":
        return ""
    base = load.model_name(config.model.name)
    return (
        "## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")  # the adapter, on '
        f'{base}\ntokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n'
    )


def export_card(target: Target, form: str) -> str:
    """README.md of an export: the run's own card where `make compare` wrote one, else a card without figures.

    form: gguf, ollama or hf, which decides the library that the hub's header names.
    """
    from huggingface_hub import ModelCard, ModelCardData

    library = "transformers" if form == "hf" else "gguf"
    measured = target.run.folder / "report" / "README.md" if target.run else None
    if measured is not None and measured.is_file():
        written = ModelCard(measured.read_text(encoding="utf-8"))
        written.data["library_name"] = library
        return str(written)
    config, base = target.config, target.config.model.name
    data = ModelCardData(
        base_model=None if load.is_model_folder(base) else base,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["sft-play", "fine-tuned", *config.experiment.tags],
        model_name=target.name,
    )
    lora = f"{config.tuning.mode} (r {config.tuning.lora.r}, alpha {config.tuning.lora.alpha})"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {config.experiment.name or target.name}\n",
        f"{config.experiment.description}\n" if config.experiment.description else "",
        f"Made with sft-play from `{load.model_name(base)}`: "
        + ("a full fine-tune" if config.tuning.mode == "full" else lora)
        + ", merged. Its quality was not measured before this export (`make compare` writes a card with figures).\n",
        "`parity.json` proves that the exported form gets the same tokens as in training.\n",
    ]
    return "\n".join(part for part in parts if part)
