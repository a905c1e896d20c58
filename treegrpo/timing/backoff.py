"""Retries with back-off: a policy (delays, jitter, limits), and the schedule of one operation that follows it.

    BACKOFF = Backoff((0.1, 0.5, 2.0), seconds=60.0)          a module's default, passed in as an argument

    retries = BACKOFF.schedule(clock)                          one per operation; its time begins now
    while True:
        try:
            return await attempt()
        except UnavailableError as error:
            delay = retries.next_delay()                       counts the failure
            if delay is None:                                  attempts or time are used up
                raise
            log.warning("%s; trying again in %.1f s", error, delay)
            await clock.sleep(delay)

`RetrySchedule.sleep` (in a task) and `RetrySchedule.wait_event` (in a thread) count and wait at once. `RetrySchedule.reset`
notes a success. A policy without limits needs no schedule: ``backoff.delay(failures)``.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from treegrpo.timing.clock import SYSTEM_CLOCK, Clock

LOG_SECONDS = 10.0
"""From the first log line about an outage to the second; each interval is twice the one before."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """A retry policy. Immutable, so that a default can be shared.

    Example:
        >>> backoff = Backoff((0.1, 1.0, 5.0))
        >>> [backoff.delay(failures) for failures in range(5)]
        [0.1, 1.0, 5.0, 5.0, 5.0]
    """

    delays: tuple[float, ...]
    """Seconds before each retry in turn; the last is repeated."""
    retries: int | None = None
    """Retries after the first attempt; None: no limit."""
    seconds: float = math.inf
    """All attempts and delays together; the last delay is cut short to end then."""
    jitter: float = 0.0
    """The random part of a delay: 0.5 takes from it up to one half."""

    def __post_init__(self) -> None:
        if not self.delays:
            raise ValueError("a back-off needs a delay")

    @classmethod
    def exponential(
        cls, first: float, longest: float, *, retries: int | None = None, seconds: float = math.inf, jitter: float = 0.0
    ) -> Self:
        """Delays that double from ``first`` up to ``longest``.

        Example:
            >>> Backoff.exponential(0.5, 3.0).delays
            (0.5, 1.0, 2.0, 3.0)
        """
        delays, delay = list[float](), first
        while 0.0 < delay < longest:
            delays.append(delay)
            delay *= 2.0
        return cls((*delays, min(delay, longest)), retries, seconds, jitter)

    def delay(self, failures: int) -> float:
        """Seconds to wait after ``failures`` before this one, without jitter."""
        return self.delays[min(failures, len(self.delays) - 1)]

    def schedule(self, clock: Clock = SYSTEM_CLOCK, uniform: Callable[[float, float], float] = random.uniform) -> RetrySchedule:
        """The schedule of one operation, whose time begins now. ``uniform`` draws the jitter."""
        return RetrySchedule(self, clock, uniform)


class RetrySchedule:
    """The failures of one operation, and when it is tried again."""

    def __init__(self, backoff: Backoff, clock: Clock, uniform: Callable[[float, float], float]) -> None:
        self._backoff = backoff
        self._clock = clock
        self._uniform = uniform
        self._began = clock.monotonic()
        self._log_at = 0.0
        self.failures = 0
        """In a row, since the beginning or the last `reset`."""

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning, or since the last `reset`."""
        return self._clock.monotonic() - self._began

    @property
    def remaining(self) -> float:
        """Seconds until nothing is tried again."""
        return self._backoff.seconds - self.elapsed

    def next_delay(self) -> float | None:
        """Count a failure: the seconds to wait before the next attempt; None when there is to be none."""
        remaining, retries = self.remaining, self._backoff.retries
        if remaining <= 0.0 or (retries is not None and self.failures >= retries):
            return None
        delay = self._backoff.delay(self.failures)
        if self._backoff.jitter:
            delay *= self._uniform(1.0 - self._backoff.jitter, 1.0)
        self.failures += 1
        return min(delay, remaining)

    async def sleep(self) -> bool:
        """Count a failure and suspend the task until the next attempt; False, at once, if there is to be none."""
        if (delay := self.next_delay()) is None:
            return False
        await self._clock.sleep(delay)
        return True

    def wait_event(self, stop: threading.Event) -> bool:
        """Count a failure and block until the next attempt; False if there is to be none, or ``stop`` is set."""
        if stop.is_set() or (delay := self.next_delay()) is None:
            return False
        return not self._clock.wait_event(stop, delay)

    def log_is_due(self) -> bool:
        """Whether to log about the outage now: at first, and after ever longer intervals."""
        elapsed = self.elapsed
        if elapsed < self._log_at:
            return False
        self._log_at = max(LOG_SECONDS, 2.0 * elapsed)
        return True

    def reset(self) -> None:
        """An attempt succeeded: the next failure is the first of a new outage, and the time begins again."""
        self.failures = 0
        self._began = self._clock.monotonic()
        self._log_at = 0.0
