"""What a lease may do at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Gate:
    """Open while the run is running, shut while it is paused; told once to expand no further, and once to come to an end.

    All leases of a process share one ``running`` event; `stop` and `cut` are each lease's own.
    """

    def __init__(self, running: asyncio.Event | None = None) -> None:
        """Without ``running`` the gate is always open."""
        self._running = running
        self._waits: set[asyncio.Timeout] = set()
        self._works: set[asyncio.Timeout] = set()
        self.stopped = False
        """True once nothing new may be begun, and nothing waited for; what runs is finished."""
        self._ended = False

    def stop(self) -> None:
        """Begin no further expansion, wait for nothing that is away."""
        self.stopped = True
        _expire(self._waits)

    def cut(self) -> None:
        """`stop`, and leave out what still runs."""
        self.stop()
        self._ended = True
        _expire(self._works)

    async def open(self) -> None:
        """Return as soon as the run is not paused."""
        if self._running is not None:
            await self._running.wait()

    @asynccontextmanager
    async def waiting(self, seconds: float | None = None) -> AsyncGenerator[None]:
        """Wait inside the block. It ends with TimeoutError after ``seconds``, or as soon as there is the word to stop."""
        async with _scope(self._waits, 0.0 if self.stopped else seconds):
            yield

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[None]:
        """Work inside the block. It ends with TimeoutError at the cut."""
        async with _scope(self._works, 0.0 if self._ended else None):
            yield


@asynccontextmanager
async def _scope(scopes: set[asyncio.Timeout], seconds: float | None) -> AsyncGenerator[None]:
    async with asyncio.timeout(seconds) as scope:
        scopes.add(scope)
        try:
            yield
        finally:
            scopes.remove(scope)


def _expire(scopes: set[asyncio.Timeout]) -> None:
    for scope in scopes:
        if not scope.expired():
            scope.reschedule(0.0)
