"""AIMD concurrency limit: how many requests a server may run at once, given its memory for keys and values.

Additive increase, multiplicative decrease, between two marks of the share that running requests hold. Below the lower
mark the limit grows as long as it is what holds work back; above the upper one, or when the server retracted requests, it
shrinks. Between the marks it stays.
"""

from __future__ import annotations

LOW_USAGE, HIGH_USAGE = 0.75, 0.92
"""Share of the tokens a server has room for. Above 1 it retracts requests, and computes their prefixes again."""
GROWTH = 1 / 16
"""Of the cap, at each adjustment."""
SHRINK = 0.75
INITIAL_SHARE = 0.5
"""Of the cap."""


class AimdLimit:
    """The limit of one server."""

    def __init__(self, cap: int) -> None:
        """``cap``: the largest limit."""
        self._cap = float(cap)
        self._limit = max(1.0, cap * INITIAL_SHARE)
        self._retractions = 0

    @property
    def current(self) -> int:
        """Requests that may run at once now; at least 1."""
        return int(self._limit)

    def count_retractions(self, times: int) -> None:
        """Count requests that the server retracted for want of memory."""
        self._retractions += times

    def adjust_limit(self, usage: float, running: int) -> None:
        """Adjust the limit to the ``usage`` of the server and to our ``running`` requests."""
        if usage > HIGH_USAGE or self._retractions:
            self._limit = max(1.0, min(self._limit, running) * SHRINK)
        elif usage < LOW_USAGE and running >= self.current:
            self._limit = min(self._cap, self._limit + max(1.0, self._cap * GROWTH))
        self._retractions = 0
