"""How many requests a server may run at once: as many as its memory for keys and values carries.

Additive increase, multiplicative decrease, between two marks of the share that running requests hold. Below the lower
mark the limit grows as long as it is what holds work back; above the upper one, or when the server had to put requests
back, it shrinks. Between the marks it stays.
"""

from __future__ import annotations

LOW, HIGH = 0.75, 0.92
"""Share of the tokens a server has room for. Above 1 it retracts requests, and computes their prefixes again."""
GROWTH = 1 / 16
"""Of the cap, at each look."""
SHRINK = 0.75
FIRST = 0.5
"""Of the cap."""


class Pressure:
    """The limit of one server."""

    def __init__(self, cap: int) -> None:
        """``cap``: never more than this."""
        self._cap = float(cap)
        self._limit = max(1.0, cap * FIRST)
        self._retracted = 0

    @property
    def limit(self) -> int:
        return int(self._limit)

    def retracted(self, times: int) -> None:
        """The server put a request back for want of memory."""
        self._retracted += times

    def look(self, usage: float, running: int) -> None:
        """Adjust the limit to what is seen: ``usage`` of the server, ``running`` requests of ours."""
        if usage > HIGH or self._retracted:
            self._limit = max(1.0, min(self._limit, running) * SHRINK)
        elif usage < LOW and running >= self.limit:
            self._limit = min(self._cap, self._limit + max(1.0, self._cap * GROWTH))
        self._retracted = 0
