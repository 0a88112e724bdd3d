"""Which chat template a run uses: the model's own, one of chat_templates/ by name, or a file."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sft.chat.template import ChatTemplate
from sft.config.paths import resolve, shipped, shown
from sft.config.schema import DataSection
from sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("sft.chat")
FOLDER = "chat_templates"
DEFAULT = "default"
FALLBACK = (
    "{{ bos_token }}{% if system %}System: {{ system }}\n{% endif %}User: {{ user }}\nAssistant: {{ assistant }}\n"
)


def load_template(data: DataSection, tokenizer: PreTrainedTokenizerBase, root: Path) -> ChatTemplate:
    """The template that `data.template_path` means; see docs/TEMPLATES.md. Paths count from `root`.

    Raises TemplateError for a missing file, a syntax error (with its line), or a template that shows no answer.
    """
    asked = data.template_path
    common: dict[str, Any] = {
        "special": {key: str(text) for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)},
        "options": dict(data.template_options),
        "control_text": data.control_text,
    }
    if asked == "auto" and (own := tokenizer.chat_template):
        return _own(own, str(tokenizer.name_or_path), common)
    path = _path(DEFAULT if asked == "auto" else asked, root)
    if asked == "auto" and not path.is_file():
        log.warning(
            f"the model has no chat template and {FOLDER}/{DEFAULT}.jinja is missing: rows are written as"
            " `System: / User: / Assistant:`"
        )
        return ChatTemplate("plain fallback", FALLBACK, origin="default", **common)
    if not path.is_file():
        raise _missing(asked, path, root)
    name = shown(path, root)
    origin: Literal["default", "named"] = "default" if asked == "auto" else "named"
    return _with_begin(ChatTemplate(name, _read(path, name), path=path, origin=origin, **common), tokenizer, common)


def names(root: Path) -> list[str]:
    """The templates that can be named, sorted."""
    folders = {resolve(root, FOLDER), shipped(root, f"{FOLDER}/{DEFAULT}.jinja").parent}
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.jinja")})


def _own(own: Any, model: str, common: dict[str, Any]) -> ChatTemplate:
    name = f"the chat template of {Path(model).name or model}"
    if isinstance(own, str):
        return ChatTemplate(name, own, origin="own", **common)
    first = own.get("default") or next(iter(own.values()))
    return ChatTemplate(name, first, tool_source=own.get("tool_use"), origin="own", **common)


def _path(asked: str, root: Path) -> Path:
    if "/" not in asked and "." not in asked:
        named = shipped(root, f"{FOLDER}/{asked}.jinja")
        if named.is_file() or not resolve(root, asked).is_file():
            return named
    return shipped(root, asked)


def _missing(asked: str, path: Path, root: Path) -> TemplateError:
    known = names(root)
    near = difflib.get_close_matches(Path(asked).stem, known, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]}? " if near else ""
    return TemplateError(
        f"the chat template {asked!r} is not there",
        where=f"data.template_path, looked for {shown(path, root)}",
        mend=f"{mend}names: {', '.join(known)}; or a file that ends in .jinja",
    )


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}", where=name) from None


def _with_begin(made: ChatTemplate, tokenizer: PreTrainedTokenizerBase, common: dict[str, Any]) -> ChatTemplate:
    """Sees to the begin token, where the tokenizer puts one before every text: templates must write it themselves."""
    begin = tokenizer.bos_token
    if not begin or begin in made.source or "bos_token" in made.source:
        return made
    if tokenizer.encode("x", add_special_tokens=True)[0] != tokenizer.bos_token_id:
        return made
    if made.style == "turn":
        source = "{{ bos_token }}" + made.source
        return ChatTemplate(made.name, source, path=made.path, origin=made.origin, **common)
    log.warning(
        f"this model's texts begin with {begin}, and {made.name} does not write it: put {{{{ bos_token }}}} first in"
        " it, unless you mean to leave it out"
    )
    return made
