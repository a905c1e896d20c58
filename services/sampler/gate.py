"""What a lease may do at the moment."""

from __future__ import annotations

import asyncio


class Gate:
    """Open while the run is running, shut while it is paused; and told once to expand no further.

    All leases of a process share one ``running`` event; `stop` is each lease's own.
    """

    def __init__(self, running: asyncio.Event | None = None) -> None:
        """Without ``running`` the gate is always open."""
        self._running = running
        self.stopped = False
        """True once nothing new may be begun; what runs is finished."""

    def stop(self) -> None:
        """Begin no further expansion."""
        self.stopped = True

    async def open(self) -> None:
        """Return as soon as the run is not paused."""
        if self._running is not None:
            await self._running.wait()
