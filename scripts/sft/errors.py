"""The error family: each says what is wrong, where it stands and how to fix it.

Raised anywhere, caught once, in `console.run`: exit 2 for what a user can fix, 1 for the rest, never a traceback
(unless SFT_DEBUG=1).
"""

from __future__ import annotations


class SftError(Exception):
    """Something went wrong that can be said in one message.

    what: one sentence. where: file:line, key or row, if known. fix: the command or edit that fixes it, if known.
    details: more for --json.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix
        self.details: dict[str, object] = {}

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class ConfigError(SftError):
    """A setting that cannot be right; `problems` holds every one that was found, so that all are shown at once."""

    def __init__(
        self, what: str, *, where: str | None = None, fix: str | None = None, problems: list[SftError] | None = None
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.problems = problems or []

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(str(problem) for problem in self.problems)])


class DataError(SftError):
    """A data file or its rows cannot be used."""


class TemplateError(SftError):
    """A chat template does not compile, does not render, or its labels cannot be proven."""


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
