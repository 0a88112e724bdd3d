"""Every check that can be made before a run without loading a model: each a line with what was found and its mend.

Under five seconds and without torch: a check that needs more belongs into `train --dry-run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sft.errors import SftError
from sft.preflight import inputs, machine
from sft.preflight.case import Case, Finding

__all__ = ["CHECKS", "Case", "Finding", "run"]
CHECKS: tuple[tuple[str, Callable[[Case], Iterator[Finding]]], ...] = (
    ("system", machine.system),
    ("packages", machine.packages),
    ("config", inputs.config),
    ("data", inputs.data),
    ("model", inputs.model),
    ("template", inputs.template),
    ("gpu", machine.gpu),
    ("disk", machine.disk),
    ("memory", machine.memory),
    ("tensorboard", machine.port),
)


def run(case: Case) -> list[Finding]:
    """Every check, in order; one that breaks is an error of its own and stops none of the others."""
    findings: list[Finding] = []
    for name, check in CHECKS:
        try:
            findings.extend(check(case))
        except SftError as error:
            where = f" ({error.where})" if error.where else ""
            findings.append(Finding("error", name, error.what + where, error.mend))
        except Exception as error:  # a check must never end the others
            findings.append(Finding("error", name, f"{type(error).__name__}: {error}", "report this, with the line"))
    return findings
