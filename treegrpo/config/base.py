"""Base class and field types of the configuration's sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class InputMarker:
    """Marks an input path: a relative one is relative to the configuration file."""


InputPath = Annotated[Path, InputMarker()]
OptionalInputPath = Annotated[Path | None, InputMarker()]


def _without_credentials(place: str) -> str:
    host = re.split("[/?#]", place.partition("//")[2] or place, maxsplit=1)[0]
    port = host.rpartition(":")[2] if ":" in host and not host.endswith("]") else ""
    half = port and not port.isdecimal() and "@" in place  # a password with a slash in it ends the host before its time
    if "@" in host or half:
        raise PydanticCustomError(
            "credentials",
            "it has a user or password, which logs and the list of processes would show; the retriever's token is "
            "security.retriever_token, the broker's password security.broker_password",
        )
    return place


Place = Annotated[str, AfterValidator(_without_credentials)]
"""Where a peer is: HOST:PORT, or the URL of a web server. It is shown and handed on, so nothing in it may be secret."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
