"""A notifier: tasks of one event loop wait for the next change of a state."""

from __future__ import annotations

import asyncio
import time


class Notifier:
    """`notify` wakes all current waiters; a later `wait` waits for the next one."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
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
