"""What a model is, read from its config.json: causal (GPT-like), seq2seq (T5-like), or neither, which cannot answer."""

from __future__ import annotations

from typing import Any, Literal

from sft.errors import ModelError

Kind = Literal["causal", "seq2seq"]
_CAUSAL = ("ForCausalLM", "LMHeadModel")
# Types that read in both directions unless `is_decoder` says otherwise, though they have a class for causal use. The
# common ones stand here so that the usual model is recognised without importing transformers.
_ENCODERS = frozenset(
    "albert bert camembert data2vec-text deberta deberta-v2 distilbert electra ernie megatron-bert mobilebert"
    " modernbert mpnet rembert roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl xmod".split()
)
_MEND = "choose a model that writes text: decoder-only (Qwen2.5, Llama, Mistral, GPT-2) or encoder-decoder (T5)"


def kind_of(config: dict[str, Any], wanted: str = "auto", *, name: str = "the model") -> Kind:
    """The kind of the model that `config` (a config.json) describes; `wanted` is `model.type`.

    Raises ModelError for encoders (BERT), classifiers and models without a language head, and where `wanted` cannot be.
    """
    found = _by_architecture(config) or _by_mapping(config)
    architecture = _architecture(config) or str(config.get("model_type"))
    if found is None:
        raise ModelError(
            f"{name} is {_article(architecture)}: it has no head that writes text, so it cannot be fine-tuned on"
            " answers",
            where="model.name",
            mend=_MEND,
        )
    if wanted in ("auto", found):
        return found
    raise ModelError(
        f"model.type is {wanted}, but {name} is {found} ({architecture})",
        where="model.type",
        mend=f"set model.type to auto or {found}",
    )


def _architecture(config: dict[str, Any]) -> str:
    listed = config.get("architectures") or []
    return str(listed[0]) if listed else ""


def _by_architecture(config: dict[str, Any]) -> Kind | None:
    """The kind by the class name that saved the weights; None where that says nothing or says no."""
    name = _architecture(config)
    if config.get("is_encoder_decoder") and name.endswith(("ForConditionalGeneration", "LMHeadModel")):
        return "seq2seq"
    if name.endswith(_CAUSAL) and not config.get("is_encoder_decoder"):
        return None if _is_encoder(config) else "causal"
    return None


def _by_mapping(config: dict[str, Any]) -> Kind | None:
    """The kind by transformers' own lists, for configs without a class name and for text models with other parts."""
    from transformers.models.auto import modeling_auto as auto

    model_type, architecture = config.get("model_type"), _architecture(config)
    if config.get("is_encoder_decoder"):
        known = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        return "seq2seq" if model_type in known and architecture in ("", known[model_type]) else None
    fills_gaps = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    if fills_gaps or _is_encoder(config) or model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    writes = architecture.endswith("ForConditionalGeneration") or not architecture
    return "causal" if writes or architecture == auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] else None


def _is_encoder(config: dict[str, Any]) -> bool:
    return config.get("model_type") in _ENCODERS and not config.get("is_decoder")


def _article(architecture: str) -> str:
    what = "an encoder" if "MaskedLM" in architecture or "Encoder" in architecture else "not a text generator"
    if "Classification" in architecture:
        what = "a classifier"
    return f"{what} ({architecture})"
