"""Models that people start with and what their config.json says, so that they are planned without a network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ConfigError, SftError
from sft.memory.shapes import known_models

if TYPE_CHECKING:
    from sft.config.schema import Config, ModelSection
    from sft.memory.devices import Device

_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
_DECODERS: dict[str, tuple[Any, ...]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", 960, 2560, 32, 15, 5, 64, 49152, True),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "google/gemma-3-1b-it": ("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, True),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "google/gemma-2-2b-it": ("gemma2", 2304, 9216, 26, 8, 4, 256, 256000, True),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "microsoft/Phi-3.5-mini-instruct": ("phi3", 3072, 8192, 32, 32, 32, 96, 32064, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
    "allenai/OLMo-2-1124-7B-Instruct": ("olmo2", 4096, 11008, 32, 32, 32, 128, 100352, False),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "google/gemma-2-9b-it": ("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, True),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
}
_T5 = {"google/flan-t5-base": (768, 2048, 12, 12), "google/flan-t5-large": (1024, 2816, 24, 16)}


def models() -> dict[str, dict[str, Any]]:
    """Hub names and configs, in no order of size."""
    found = dict(known_models())
    for name, values in _DECODERS.items():
        found[name] = dict(zip(_KEYS, values, strict=True))
        if found[name]["model_type"] == "phi3":
            found[name]["pad_token_id"] = 32000
    for name, (width, inner, layers, heads) in _T5.items():
        found[name] = {
            "model_type": "t5",
            "is_encoder_decoder": True,
            "d_model": width,
            "d_ff": inner,
            "d_kv": 64,
            "num_layers": layers,
            "num_heads": heads,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        }
    return found


def listed(given: Sequence[str]) -> list[str]:
    """Model names: those given, those in a file that is given (a name a line, `#` for remarks), or the shipped list.

    Raises ConfigError for a file without names.
    """
    found: list[str] = []
    for each in given:
        path = Path(each)
        if not path.is_file():
            found.append(each)
            continue
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ConfigError("there is no model name in it", where=each, mend="write one name a line")
        found += [line for line in lines if line]
    return found or list(models())


def description(section: ModelSection, root: Path) -> dict[str, Any]:
    """The config.json of `model.name`: its folder's, the list's, or the hub's (the one file that is fetched)."""
    from sft.model import hub

    known = models().get(section.name)
    if known is not None and hub.local_folder(section.name, root) is None:
        return known
    return hub.find(section, root, weights=False).config


def each(
    names: Sequence[str], config: Config, device: Device, root: Path, report: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """The plan of every model under this config, smallest first; one that cannot be planned says why."""
    from sft.memory import plan

    logging.getLogger("sft.config").setLevel(logging.ERROR)  # what is said of one model's settings is noise here
    found: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names, 1):
        section = config.model.model_copy(update={"name": name, "revision": None})
        try:
            settings = config.model_copy(update={"model": section})
            made = plan.make(settings, description(section, root), device, root=root, mend=False)
            found[name] = {"billions": made.parameters / 1e9, **made.to_json()}
        except SftError as error:
            found[name] = {"fits": False, "error": str(error).splitlines()[0]}
        report(done, len(names))
    return dict(sorted(found.items(), key=lambda item: float(item[1].get("billions", "inf"))))
