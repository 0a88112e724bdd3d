"""What a template asks of a tokenizer, read from its files: transformers takes four seconds to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tokenizer:
    """Special tokens, chat template and the ids of a text."""

    def __init__(self, folder: Path) -> None:
        read = {name: folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")}
        said = {
            key: value
            for path in read.values()
            if path.is_file()
            for key, value in json.loads(path.read_text(encoding="utf-8")).items()
        }
        self.name_or_path = str(folder)
        self.special_tokens_map = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in said.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        self.bos_token = self.special_tokens_map.get("bos_token")
        self.chat_template = said.get("chat_template")
        if isinstance(self.chat_template, list):
            self.chat_template = {entry["name"]: entry["template"] for entry in self.chat_template}
        if (folder / "chat_template.jinja").is_file():
            self.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.folder = folder

    @property
    def bos_token_id(self) -> int | None:
        return self._fast().token_to_id(self.bos_token) if self.bos_token else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._fast().encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _fast(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))
