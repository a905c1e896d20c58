"""A request as the scheduler has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from services.sampler.engines.generation import Sampled


@dataclass(slots=True, eq=False)
class Request(Sampled):
    """Waiting, running in a row, or finished (`finish` is set)."""

    chance: Random | None = field(init=False)
    """Random numbers of its own; None: the engine's."""

    def __post_init__(self) -> None:
        self.chance = None if self.sampling.seed is None else Random(self.sampling.seed)

    @property
    def length(self) -> int:
        """Tokens of the prefix and the completion so far."""
        return len(self.prefix) + len(self.ids)
