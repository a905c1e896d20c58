"""How long an event loop was held up by the work of its own process."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

BEAT_SECONDS = 0.005
STALL_SECONDS = 0.25
"""No work on foreign input may hold up an event loop for longer."""


class Stalls:
    """Beats in the running loop and measures how late each beat comes.

    Late means both by the clock and by what the process computed meanwhile: a machine that is busy with others does not count,
    and work in a thread that holds the interpreter does.

    Example:
        async with Stalls() as stalls:
            await work()
        assert stalls.worst < STALL_SECONDS
    """

    def __init__(self) -> None:
        self.worst = 0.0

    async def __aenter__(self) -> Self:
        self._beating = asyncio.create_task(self._beat(), name="stalls")
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.sleep(BEAT_SECONDS)  # one beat more, after the last piece of work
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            clock, computed = time.monotonic(), time.process_time()
            await asyncio.sleep(BEAT_SECONDS)
            late = min(time.monotonic() - clock - BEAT_SECONDS, time.process_time() - computed)
            self.worst = max(self.worst, late)
