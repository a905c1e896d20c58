"""A clock that is passed in: the monotonic time, and ways to wait. Tests pass `tests.manual_clock.ManualClock`."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Measures durations and waits. Code that only measures takes a ``Callable[[], float]``: `monotonic`."""

    def monotonic(self) -> float:
        """Seconds since some instant in the past; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Suspend the current task."""
        ...

    def wait_event(self, event: threading.Event, seconds: float) -> bool:
        """Block the current thread until ``event`` is set or ``seconds`` have passed; whether it is set."""
        ...


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def wait_event(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)


SYSTEM_CLOCK = SystemClock()
