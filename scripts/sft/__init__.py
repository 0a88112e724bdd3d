"""The packages that the commands in scripts/ share; and the commands as functions, `from sft import train` (api.py).

docs/ARCHITECTURE.md says what each package owns and may import.
"""

from __future__ import annotations

from typing import Any

_API = ("load_config", "prepare", "train", "evaluate", "generate", "open_model", "run_command")


def __getattr__(name: str) -> Any:
    """The functions of sft/api.py, imported when one of them is used: `import sft` alone stays instant."""
    if name not in _API:
        raise AttributeError(f"module 'sft' has no attribute {name!r}")
    from sft import api

    return getattr(api, name)
