"""Watches an event loop: what keeps it for longer than STALL_SECONDS is a stall, and is told of.

    python -m tests.fuzz.watchdog MODULE ARGUMENTS…      runs a module as `python -m` does, watched; stalls go to standard error

It sees a loop in two ways. `watched` times every callback, and says which one it was. `Watchdog.beating` has the running
loop beat and measures how late each beat comes: so it sees what a thread keeps of the interpreter, too. Seconds on a processor
count, so that a machine that is busy with others is no stall; of a callback that only waits, all do.
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
SAYS = "the event loop stalled"


class Watchdog:
    """The longest stretch so far, and what each stall was."""

    def __init__(self) -> None:
        self.seen = 0
        self.longest = 0.0
        self.stalls: list[str] = []

    def see(self, busy: float, took: float, what: object) -> None:
        """The loop was kept: seconds on a processor, seconds in all."""
        self.seen += 1
        self.longest = max(self.longest, busy)
        if busy > STALL_SECONDS or took > WAIT_SECONDS:
            self.stalls.append(f"{SAYS} for {took:.3f} s ({busy:.3f} s on a processor) in {what!r}"[:2000])

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
            self.see(busy, busy, "what came between two beats")


@contextlib.contextmanager
def watched(tell: Callable[[str], None] = lambda _: None) -> Generator[Watchdog]:
    """Every callback of every event loop of this process is timed in the block; ``tell`` hears of each stall at once."""
    dog, run = Watchdog(), asyncio.Handle._run  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType, reportUnknownMemberType, reportAttributeAccessIssue]

    def timed(handle: Any) -> None:
        told, busy, took = len(dog.stalls), time.thread_time(), time.monotonic()
        try:
            run(handle)
        finally:
            dog.see(time.thread_time() - busy, time.monotonic() - took, handle)
            for stall in dog.stalls[told:]:
                tell(stall)

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
