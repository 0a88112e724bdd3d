"""The ways in which an exported model is used: by transformers and vLLM, by llama.cpp, by Ollama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.chat.template import ChatTemplate, Refused
from sft.errors import TemplateError
from sft.ship.gguf_vocabulary import Vocabulary
from sft.ship.go_template import GoTemplate
from sft.ship.parity import Messages, Route

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def of_folder(folder: Path, *, trust_remote_code: bool) -> Route:
    """A folder of safetensors as transformers, vLLM and TGI open it: AutoTokenizer and its `apply_chat_template`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    settings = folder / "generation_config.json"
    said = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id", []) if settings.is_file() else []
    stops = frozenset(said if isinstance(said, list) else [said])

    def ids(messages: Messages, tools: list[Any] | None, prompt: bool) -> list[int]:
        if tokenizer.chat_template is None:
            raise Refused("the folder has no chat template that other programs can use")
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
        except Exception as error:
            raise TemplateError(
                f"parity: the exported template fails where training's does not: {' '.join(str(error).split())[:200]}",
                where=str(folder),
            ) from None
        made: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return made

    def text(rendered: str) -> list[int]:
        made: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
        return made

    return Route("safetensors", ids, text, stops)


def of_gguf(vocabulary: Vocabulary, source: str, tokenizer: PreTrainedTokenizerBase) -> Route:
    """llama.cpp with the file's own template: a begin token that it adds itself is taken off the text first."""
    special = {key: str(text) for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    template = ChatTemplate("the template in the GGUF file", source, special)
    text = _tokenised(vocabulary)

    def ids(messages: Messages, tools: list[Any] | None, prompt: bool) -> list[int]:
        return text(template.render(messages, tools=tools, add_generation_prompt=prompt))

    return Route("gguf", ids, text, frozenset(vocabulary.stops()))


def of_ollama(vocabulary: Vocabulary, template: GoTemplate, stops: list[str]) -> Route:
    """Ollama with the Modelfile's template and stop texts."""
    text = _tokenised(vocabulary)
    named = {at for at, token in enumerate(vocabulary.tokens) if token in stops}

    def ids(messages: Messages, tools: list[Any] | None, prompt: bool) -> list[int]:
        if tools:
            raise Refused("tools are not told in an Ollama template of ours")
        return text(template.render(messages, prompt=prompt))

    return Route("ollama", ids, text, frozenset(vocabulary.stops() | named))


def _tokenised(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    built = vocabulary.built()
    begin = vocabulary.tokens[vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else None

    def text(rendered: str) -> list[int]:
        made: list[int] = built.encode(rendered.removeprefix(begin or ""), add_special_tokens=False).ids
        return made if begin is None else [int(vocabulary.bos or 0), *made]

    return text
