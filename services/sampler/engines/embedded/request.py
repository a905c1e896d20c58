"""A request in the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from services.sampler.engines.generation import Generation


@dataclass(slots=True, eq=False)
class Request(Generation):
    """Waiting, running in a row, or finished (`finish` is set)."""

    random: Random | None = field(init=False)
    """Its own random number generator; None: the engine's."""

    def __post_init__(self) -> None:
        self.random = None if self.sampling.seed is None else Random(self.sampling.seed)

    @property
    def length(self) -> int:
        """Tokens of the prefix and the completion so far."""
        return len(self.prefix) + len(self.ids)
