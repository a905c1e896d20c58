"""Waiting for something that should come back: ever longer pauses, an end, and a word about it now and then."""

from __future__ import annotations

import logging
import threading
import time

log = logging.getLogger(__name__)
SAY_SECONDS = 10.0
"""From the first word to the second; the time between two doubles."""


class Patience:
    """The pauses between attempts.

    Example:
        patience = Patience(600.0, stop, first=0.1, longest=5.0)
        while not works():
            if not patience.wait("The intake is away"):
                raise UnavailableError(...)
    """

    def __init__(self, seconds: float, stop: threading.Event, *, first: float, longest: float) -> None:
        """Args:
        seconds: all pauses together.
        stop: set: there is no further attempt.
        first: the first pause in seconds; each is twice the one before.
        longest: the longest one.
        """
        self._seconds, self._stop = seconds, stop
        self._pause, self._longest = first, longest
        self._began = time.monotonic()
        self._say_at = 0.0

    def wait(self, what: str) -> bool:
        """Pause, and say ``what`` is waited for if it is time to; False if nothing more is to be tried."""
        left = self._seconds - self.waited
        if self._stop.is_set() or left <= 0:
            return False
        if self.waited >= self._say_at:
            log.warning("%s Trying again for up to %.0f s.", what, left)
            self._say_at = max(SAY_SECONDS, 2 * self.waited)
        told = self._stop.wait(min(self._pause, left))
        self._pause = min(2 * self._pause, self._longest)
        return not told

    @property
    def waited(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began
