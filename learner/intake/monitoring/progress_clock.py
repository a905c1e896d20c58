"""Measures how long the run has made no progress, and how long its usual pauses are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

QUIET_SECONDS = 60.0
"""A shorter pause is never a stall, however fast the run is."""
USUAL_PAUSE_FACTOR = 3
"""A pause is a stall when it is so many times as long as the longest of the last pauses."""
MAX_PAUSES = 64
"""Pauses of a second and more that are remembered: those of the last few steps."""


class ProgressClock:
    """When the run last made progress: a subtree accepted, a batch handed out, a version published."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last_progress = clock()
        """An instant of the clock."""
        self._pauses: deque[float] = deque(maxlen=MAX_PAUSES)

    def record_progress(self) -> None:
        now = self._clock()
        if (pause := now - self.last_progress) >= 1.0:
            self._pauses.append(min(pause, self.stall_seconds))  # a stall does not make the next one usual
        self.last_progress = now

    @property
    def seconds_without_progress(self) -> float:
        return self._clock() - self.last_progress

    @property
    def stall_seconds(self) -> float:
        """A pause of so many seconds is a stall."""
        return max(QUIET_SECONDS, USUAL_PAUSE_FACTOR * max(self._pauses, default=0.0))
