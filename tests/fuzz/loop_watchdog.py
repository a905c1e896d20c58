"""Detects stalls of an event loop: callbacks that hold it for longer than STALL_SECONDS.

    python -m tests.fuzz.loop_watchdog MODULE ARGUMENTS…   runs a module as `python -m` does; stalls go to standard error

It measures in two ways. `watched` times every callback, and names it. `LoopWatchdog.beating` measures how late a periodic task
runs, and so detects a thread that holds the interpreter, too. CPU seconds count, so that a busy machine is not taken for a stall;
of a callback that only waits, all seconds count.
"""

from __future__ import annotations

import asyncio
import contextlib
import runpy
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

STALL_SECONDS = 0.25
"""No work on foreign input may hold up an event loop for longer."""
WAIT_SECONDS = 2.0
"""A callback that waits, for a disk or a lock, meets the noise of a busy machine too."""
BEAT_SECONDS = 0.005
STALL_MESSAGE = "the event loop stalled"


class LoopWatchdog:
    """The longest callback so far, and a sentence for each stall."""

    def __init__(self) -> None:
        self.seen = 0
        self.longest = 0.0
        self.stalls: list[str] = []

    def record_callback(self, busy: float, took: float, what: object) -> None:
        """Record a callback: its CPU seconds and its seconds in all."""
        self.seen += 1
        self.longest = max(self.longest, busy)
        if busy > STALL_SECONDS or took > WAIT_SECONDS:
            self.stalls.append(f"{STALL_MESSAGE} for {took:.3f} s ({busy:.3f} s on a processor) in {what!r}"[:2000])

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncGenerator[None]:
        """See how late the beats of the running loop come in the block."""
        beating = asyncio.create_task(self._beat(), name="watchdog")
        await asyncio.sleep(0)
        try:
            yield
            await asyncio.sleep(BEAT_SECONDS)  # one beat more, after the last piece of work
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            clock, computed = time.monotonic(), time.process_time()
            await asyncio.sleep(BEAT_SECONDS)
            busy = min(time.monotonic() - clock - BEAT_SECONDS, time.process_time() - computed)
            self.record_callback(busy, busy, "what came between two beats")


@contextlib.contextmanager
def watched(report: Callable[[str], None] = lambda _: None) -> Generator[LoopWatchdog]:
    """Every callback of every event loop of this process is timed in the block; ``report`` is called with each stall at once."""
    dog, run = LoopWatchdog(), asyncio.Handle._run  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType, reportUnknownMemberType, reportAttributeAccessIssue]

    def timed(handle: Any) -> None:
        reported, busy, took = len(dog.stalls), time.thread_time(), time.monotonic()
        try:
            run(handle)
        finally:
            dog.record_callback(time.thread_time() - busy, time.monotonic() - took, handle)
            for stall in dog.stalls[reported:]:
                report(stall)

    asyncio.Handle._run = timed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield dog
    finally:
        asyncio.Handle._run = run  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    with watched(lambda stall: print(stall, file=sys.stderr, flush=True)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
