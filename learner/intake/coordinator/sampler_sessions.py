"""The samplers that are connected, and what each wants."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from treegrpo.v1.rollout_pb2 import RolloutResponse


@dataclass(slots=True, eq=False)
class SamplerSession:
    """One incarnation of a sampler with an open stream."""

    id: str
    incarnation: int
    engine: str
    capacity: int
    room: int
    """Messages that may wait for it. One that does not read its stream is cut off before they are more."""
    demand: int = 0
    """Leases it wants to hold at once."""
    outbox: asyncio.Queue[RolloutResponse | None] = field(default_factory=asyncio.Queue[RolloutResponse | None])
    """None is the end."""
    heard: float = field(default_factory=time.monotonic)
    """time.monotonic of its last message; infinite while the intake itself keeps it waiting."""
    waits_for: str = ""
    """What nothing goes on without there, in its own words; empty while something goes on."""
    waited: float = 0.0
    """Seconds, at its last heartbeat."""
    stream: asyncio.Timeout | None = None
    """Ends its stream when it is rescheduled."""
    farewell: str = ""
    """Why the learner ended it."""

    holder: str = field(init=False)
    """What its leases are filed under: a restarted sampler is somebody else."""

    def __post_init__(self) -> None:
        self.holder = f"{self.id}/{self.incarnation:016x}"

    def send(self, message: RolloutResponse) -> None:
        if self.outbox.qsize() < self.room:
            self.outbox.put_nowait(message)
        else:
            self.hang_up(f"Sampler {self.id} leaves {self.room} messages unread; it has to join again.")

    def close(self) -> None:
        """Nothing more is written to it than what is being written."""
        while not self.outbox.empty():
            self.outbox.get_nowait()
        self.outbox.put_nowait(None)

    def hang_up(self, why: str) -> None:
        """End its stream. It may open another."""
        self.farewell = self.farewell or why
        if self.stream is not None:
            self.stream.reschedule(0.0)
