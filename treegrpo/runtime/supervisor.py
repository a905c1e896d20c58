"""Supervisor: starts a process again, with back-off, when it ends before its work is done, and gives up after a while.

    start ─► runs ─► ended ─┬─ its work is done, or `stop` is set ──────────► over
      ▲                     ├─ more often in a row than the policy allows ──► given up
      └───── back-off ◄─────┴─ in any other way

What a start is, when it is ready and how its end is judged is the caller's: `Supervisor.supervise` calls ``run_once`` in a
task, `Supervisor.supervise_blocking` in a thread. An error that ``run_once`` raises ends the supervision.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import overload

from treegrpo.timing.backoff import Backoff
from treegrpo.timing.clock import SYSTEM_CLOCK, Clock


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process is started again, and when it is given up."""

    backoff: Backoff = Backoff((1.0, 2.0, 5.0, 10.0, 20.0), retries=5)
    """Before each restart in a row."""
    stable_seconds: float = 60.0
    """After it ran for longer than this, the next restart is the first in a row again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one run of the process, before its work was done."""

    reason: str
    """A sentence: how it ended, and why."""
    stable_seconds: float = 0.0
    """How long it ran well."""


RunOnce = Callable[[], Awaitable[Ended | None]]


class Supervisor:
    """Counts the restarts of one process."""

    def __init__(self, policy: RestartPolicy, on_restart: Callable[[str, float], None], clock: Clock = SYSTEM_CLOCK) -> None:
        """``on_restart`` is called with the reason and with the seconds until the restart, before they are waited for."""
        self._stable_seconds = policy.stable_seconds
        self._on_restart = on_restart
        self._clock = clock
        self._retries = policy.backoff.schedule(clock)

    @property
    def starts(self) -> int:
        """Starts in a row."""
        return self._retries.failures + 1

    @overload
    async def supervise(self, run_once: Callable[[], Awaitable[Ended]]) -> Ended: ...
    @overload
    async def supervise(self, run_once: RunOnce, stop: asyncio.Event | None = ...) -> Ended | None: ...
    async def supervise(self, run_once: RunOnce, stop: asyncio.Event | None = None) -> Ended | None:
        """Call ``run_once``, which returns None when the work is done, until then or until ``stop`` is set.

        Returns:
            The last end, if the process is given up; None, if its work is done or ``stop`` is set.
        """
        while stop is None or not stop.is_set():
            ended = await run_once()
            if ended is None or (stop is not None and stop.is_set()):
                return None
            if (delay := self._next_delay(ended)) is None:
                return ended
            await self._sleep(delay, stop)
        return None

    def supervise_blocking(self, run_once: Callable[[], Ended | None], stop: threading.Event) -> Ended | None:
        """`supervise` in a thread."""
        while not stop.is_set():
            ended = run_once()
            if ended is None or stop.is_set():
                return None
            if (delay := self._next_delay(ended)) is None:
                return ended
            self._clock.wait_event(stop, delay)
        return None

    def _next_delay(self, ended: Ended) -> float | None:
        """Count an end and call `on_restart`; the seconds until the restart, None if the process is given up."""
        if ended.stable_seconds > self._stable_seconds:
            self._retries.reset()
        if (delay := self._retries.next_delay()) is not None:
            self._on_restart(ended.reason, delay)
        return delay

    async def _sleep(self, seconds: float, stop: asyncio.Event | None) -> None:
        """Wait, but no longer than until ``stop`` is set."""
        if stop is None:
            await self._clock.sleep(seconds)
            return
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        stopping = asyncio.create_task(stop.wait(), name="supervisor-stop")
        try:
            await asyncio.wait({sleeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            stopping.cancel()
