"""Watches an event loop: a callback that keeps it for longer than STALL_SECONDS is a stall, and is told of.

    python -m tests.fuzz.watchdog MODULE ARGUMENTS…      runs a module as `python -m` does, watched; stalls go to standard error

`stalls.Stalls` measures one loop from inside, with what other threads keep of the interpreter; this one says which callback
it was, and watches servers. Seconds of the loop's thread on a processor count, so that a busy machine is no stall; of a
callback that only waits, all do.
"""

from __future__ import annotations

import asyncio
import contextlib
import runpy
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from tests.fuzz.stalls import STALL_SECONDS

WAIT_SECONDS = 2.0
"""A callback that waits, for a disk or a lock, meets the noise of a busy machine too."""
SAYS = "the event loop stalled"


class Watchdog:
    """The longest callback so far, and what each stall was."""

    def __init__(self) -> None:
        self.callbacks = 0
        self.longest = 0.0
        self.stalls: list[str] = []

    def see(self, busy: float, took: float, what: object) -> None:
        """A callback ended: seconds on a processor, seconds in all."""
        self.callbacks += 1
        self.longest = max(self.longest, busy)
        if busy > STALL_SECONDS or took > WAIT_SECONDS:
            self.stalls.append(f"{SAYS} for {took:.3f} s ({busy:.3f} s on a processor) in {what!r}"[:2000])


@contextlib.contextmanager
def watched(tell: Callable[[str], None] = lambda _: None) -> Generator[Watchdog]:
    """Every callback of every event loop of this process is timed in the block; ``tell`` hears of each stall at once."""
    dog, run = Watchdog(), asyncio.Handle._run  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType, reportUnknownMemberType, reportAttributeAccessIssue]

    def timed(handle: Any) -> None:
        seen, busy, took = len(dog.stalls), time.thread_time(), time.monotonic()
        try:
            run(handle)
        finally:
            dog.see(time.thread_time() - busy, time.monotonic() - took, handle)
            for stall in dog.stalls[seen:]:
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
