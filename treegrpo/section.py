"""What every section of the configuration is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict


class Input:
    """Marks a path that is read, hence relative to the file that names it."""


InputPath = Annotated[Path, Input()]
OptionalInputPath = Annotated[Path | None, Input()]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
