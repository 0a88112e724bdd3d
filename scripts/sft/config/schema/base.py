"""What every section of the schema has in common: frozen, strict, no unknown keys; and the word `auto`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Auto = Literal["auto"]


class Section(BaseModel):
    """A frozen mapping that takes no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
