"""The model card says what the folder holds, with the figures of the run as it went."""

from __future__ import annotations

import pytest

from sft.config.schema import Config
from sft.report.model_card import card

MEASURED = {
    "at": "2026-01-02 03:04", "kind": "causal", "split": "test", "versions": {"torch": "2.13"}, "data": {},
    "training": {"epochs": 1.3, "steps": 26, "seconds": 61.2},
    "comparisons": [{
        "metrics": {"rougeL": {
            "base": 0.1, "tuned": 0.5, "difference": 0.4, "low": 0.3, "high": 0.5, "wins": 9, "ties": 1, "losses": 0,
            "finding": "better",
        }},
        "verdict": {"headline": "Better", "words": "rougeL rose"},
        "stopping": {"headline": "Answers end"},
    }],
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "form", "words"),
    [
        ("qlora", "adapter", ["This is a QLoRA adapter (r 16, alpha 32) for", "library_name: peft", "AutoPeft"]),
        (
            "qlora",
            "gguf",
            ["a QLoRA adapter (r 16, alpha 32) merged", "library_name: gguf", "llama-server -m w.gguf"],
        ),
        ("lora", "ollama", ["merged into its weights, as a GGUF file", "ollama create mine -f Modelfile"]),
        ("full", "hf", ["after a full fine-tune, made", "library_name: transformers", "= AutoModelForCausalLM"]),
    ],
)
def test_each_form_has_its_own_words_and_code(mode: str, form: str, words: list[str]) -> None:
    config = Config()
    config = config.model_copy(update={"tuning": config.tuning.model_copy(update={"mode": mode})})
    text = card(config, "mine", form, result=MEASURED, weights="w.gguf" if form in ("gguf", "ollama") else "")
    assert all(part in text for part in words), text
    assert ("lora" in text.split("---")[1]) == (form == "adapter") and ("Peft" in text) == (form == "adapter")
    assert "| epochs | 1.3 |" in text and "| rougeL |" in text  # the config says 3 or more
    assert "was not measured" in card(config, "mine", form) and "parity.json" not in text


def test_the_settings_of_methods_are_named_where_they_are_set() -> None:
    raw = {"tuning": {"lora": {"init": "pissa", "dropout": 0}}, "train": {"neftune_alpha": 5}}
    raw["tuning"]["adapter_path"] = "/home/me/adapters/first"
    with pytest.raises(ValueError, match="both say what the adapter begins with"):
        Config.model_validate(raw)
    raw["tuning"]["lora"]["init"] = "default"
    text = card(Config.model_validate(raw), "mine", "adapter", result=MEASURED)
    assert "| train.neftune_alpha | 5.0 |" in text and "| went on from | first |" in text
    assert "tuning.lora" not in text and "/home/me" not in text
    prefix = Config.model_validate({"tuning": {"adapter": "prefix"}})
    assert "a prefix of 20 positions (prefix tuning) for" in card(prefix, "mine", "adapter", result=MEASURED)


def test_rehearsal_is_part_of_the_data() -> None:
    counts = {"rows_read": 90, "rows_trained": 63, "tokens": 900, "labelled_tokens": 400}
    for ledger, is_named in (({"train": counts}, False), ({"train": counts, "rehearsal": counts}, True)):
        text = card(Config(), "mine", "adapter", result={**MEASURED, "data": {"run": ledger}})
        line = "Rehearsed beside them: 63 general questions with the base's own answers, 20% of the tokens in the loss."
        assert (line in text) == is_named


def test_elastic_weight_consolidation_is_named() -> None:
    config = Config.model_validate({"tuning": {"mode": "full"}, "train": {"ewc": {"strength": 30.0}}})
    counts = {"rows_read": 128, "rows_trained": 97, "tokens": 900, "labelled_tokens": 400}
    text = card(config, "mine", "hf", result={**MEASURED, "data": {"run": {"ewc": counts}}})
    assert "consolidation of strength 30, from the base's answers to 97 general questions." in text
