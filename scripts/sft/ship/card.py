"""The model card of an export: the one that `make compare` wrote for the run, else a short one with what is known."""

from __future__ import annotations

from sft.config import paths
from sft.generation.targets import Target


def of(target: Target, form: str) -> str:
    """README.md of an export with the hub's header. form: gguf, ollama or hf."""
    from huggingface_hub import ModelCard, ModelCardData

    written = target.run.folder / "report" / "README.md" if target.run else None
    library = "transformers" if form == "hf" else "gguf"
    if written is not None and written.is_file():
        card = ModelCard(written.read_text(encoding="utf-8"))
        card.data["library_name"] = library
        return str(card)
    base = target.config.model.name
    data = ModelCardData(
        base_model=None if paths.is_model_folder(base) else base,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["sft-play", "fine-tuned", *target.config.experiment.tags],
        model_name=target.name,
    )
    tuning = target.config.tuning
    how = (
        "a full fine-tune" if tuning.mode == "full" else f"{tuning.mode} (r {tuning.lora.r}, alpha {tuning.lora.alpha})"
    )
    about = f"{target.config.experiment.description}\n\n" if target.config.experiment.description else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {target.config.experiment.name or target.name}\n\n"
        f"{about}Made with sft-play from `{paths.model_name(base)}`: {how}, merged. How good it"
        " is was not measured when this was exported (`make compare` writes a card with figures).\n\n"
        "`parity.json` proves that the exported form is asked, token by token, as in training.\n"
    )
