"""A thing that changes, for tasks of one event loop to wait on."""

from __future__ import annotations

import asyncio
import time


class Notifier:
    """`tell` wakes everybody who waits now; who waits later waits for the next."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, deadline: float | None = None) -> bool:
        """Wait for the next change; False when ``deadline`` (time.monotonic) comes first."""
        event = self._event
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                await event.wait()
        except TimeoutError:
            return False
        return True
