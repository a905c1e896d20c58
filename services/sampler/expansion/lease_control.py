"""Pause, stop and cancellation of one lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class LeaseControl:
    """Tells a lease whether it may run: pausing is shared by all leases of a process, stopping is each lease's own."""

    def __init__(self, running: asyncio.Event | None = None) -> None:
        """``running`` is set while the run is not paused; None: it is never paused."""
        self._running = running
        self._waits: set[asyncio.Timeout] = set()
        self._works: set[asyncio.Timeout] = set()
        self.stopped = False
        """True once nothing new may be started and nothing waited for; what runs is finished."""
        self._cancelled = False

    def stop_expanding(self) -> None:
        """Start no further expansion and stop waiting for unavailable parts; what runs is finished."""
        self.stopped = True
        _expire(self._waits)

    def cancel_running(self) -> None:
        """`stop_expanding`, and cancel what still runs."""
        self.stop_expanding()
        self._cancelled = True
        _expire(self._works)

    async def wait_until_running(self) -> None:
        """Return as soon as the run is not paused."""
        if self._running is not None:
            await self._running.wait()

    @asynccontextmanager
    async def wait_scope(self, seconds: float | None = None) -> AsyncGenerator[None]:
        """A block that waits. It ends with TimeoutError after ``seconds``, or once the lease is stopped."""
        async with _timeout_scope(self._waits, 0.0 if self.stopped else seconds):
            yield

    @asynccontextmanager
    async def work_scope(self) -> AsyncGenerator[None]:
        """A block that works. It ends with TimeoutError once the lease is cancelled."""
        async with _timeout_scope(self._works, 0.0 if self._cancelled else None):
            yield


@asynccontextmanager
async def _timeout_scope(scopes: set[asyncio.Timeout], seconds: float | None) -> AsyncGenerator[None]:
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
