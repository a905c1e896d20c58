"""The samplers that are connected, and what each wants."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from treegrpo.v1.rollout_pb2 import RolloutResponse


@dataclass(slots=True, eq=False)
class Peer:
    """One incarnation of a sampler with an open stream."""

    id: str
    incarnation: int
    engine: str
    capacity: int
    demand: int = 0
    """Leases it wants to hold at once."""
    outbox: asyncio.Queue[RolloutResponse] = field(default_factory=asyncio.Queue[RolloutResponse])

    @property
    def holder(self) -> str:
        """What its leases are filed under: a restarted sampler is somebody else."""
        return f"{self.id}/{self.incarnation:016x}"

    def send(self, message: RolloutResponse) -> None:
        self.outbox.put_nowait(message)
