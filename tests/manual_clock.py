"""A clock that goes on only when somebody waits on it, or `advance` moves it."""

from __future__ import annotations

import asyncio
import threading


class ManualClock:
    """`treegrpo.timing.clock.Clock` without waiting."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.delays: list[float] = []
        """What was waited for, in order."""

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    async def sleep(self, seconds: float) -> None:
        self._pass(seconds)
        await asyncio.sleep(0)

    def wait_event(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            self._pass(seconds)
        return event.is_set()

    def _pass(self, seconds: float) -> None:
        self.delays.append(seconds)
        self.now += seconds
