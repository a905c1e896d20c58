"""How long it is that nothing has gone on, and whether that is unusual for this run."""

from __future__ import annotations

import time
from collections import deque

QUIET_SECONDS = 60.0
"""Less is no reason for words, however fast the run is."""
USUAL_TIMES = 3
"""So many times the longest of the last pauses is unusual."""
PAUSES = 64
"""Pauses of a second and more that are remembered: those of the last few steps."""


class ProgressClock:
    """When something last went on, and how long a pause usually is. Times are time.monotonic."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self._pauses: deque[float] = deque(maxlen=PAUSES)

    def progress(self) -> None:
        """Something goes on."""
        now = time.monotonic()
        if (pause := now - self.last) >= 1.0:
            self._pauses.append(min(pause, self.patience))  # one that was too long makes the next no normal thing
        self.last = now

    @property
    def patience(self) -> float:
        """Seconds of a pause that is no longer usual."""
        return max(QUIET_SECONDS, USUAL_TIMES * max(self._pauses, default=0.0))
