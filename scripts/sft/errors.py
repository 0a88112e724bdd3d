"""The errors that users see: what happened, where, and how to fix it; and the helpers that word them.

`console.run` catches every SftError: exit code 2 for what the user can fix, no traceback (unless SFT_DEBUG=1).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}\b")
_secrets: set[str] = set()


class SftError(Exception):
    """An error that one message explains.

    what: one sentence. where: file:line, key or row, if known. fix: the command or edit that fixes it, if known.
    problems: each of several, so that all are shown at once. details: more for --json.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | None = None, fix: str | None = None, problems: Sequence[SftError] = ()
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.fix, self.problems = what, where, fix, problems
        self.details: dict[str, object] = {}

    def entry(self) -> dict[str, object]:
        """Its three parts, as --json prints them."""
        return {"error": self.what, "where": self.where, "fix": self.fix}

    def __str__(self) -> str:
        where = f"\n  where: {self.where}" if self.where else ""
        own = self.what + where + (f"\n  fix:   {self.fix}" if self.fix else "")
        return "\n".join([own, *(str(problem) for problem in self.problems)])


class ConfigError(SftError):
    """An invalid setting."""


class DataError(SftError):
    """A data file or its rows cannot be used."""


class TemplateError(SftError):
    """A chat template does not compile, does not render, or its labels cannot be derived."""


class ModelError(SftError):
    """A model, tokenizer or adapter is missing, incomplete, gated or of the wrong kind."""


class RunError(SftError):
    """A run folder, checkpoint or lock is not as it must be."""


class EnvironmentProblem(SftError):
    """The machine lacks something: a port, disk, memory, a library, a supported system."""


class Stopped(SftError):
    """The user stopped the command (130) or the system did (143)."""

    def __init__(self, what: str, *, exit_code: int = 130, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


def one_line(error: object, limit: int = 300) -> str:
    """The text of a library's error (or of anything) on one line, at most `limit` characters, without secrets."""
    return redact(" ".join(str(error).split()))[:limit]


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice most like `name`, for "did you mean"; None if none is similar enough (0 any, 1 equal)."""
    return next(iter(difflib.get_close_matches(name, list(choices), 1, cutoff)), None)


def register_secret(text: str) -> None:
    """Has `redact` replace `text` from now on."""
    if len(text) >= 8:
        _secrets.add(text)


def redact(text: str) -> str:
    """`text` with every registered secret, and whatever is shaped like a hub token, replaced by `hf_***`."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "hf_***")
    return _HUB_TOKEN.sub("hf_***", text)
