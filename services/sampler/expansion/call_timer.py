"""How long turns take, which of them run, and when one last came to its end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator

from services.sampler.expansion.lease_budget import Bill
from services.sampler.expansion.stall_monitor import Want
from treegrpo.core.budget import Cost
from treegrpo.observability.metrics import SamplerMetrics

WORK_SECONDS = 60.0
"""A turn may well take so long while nothing else comes to its end."""


class Clock:
    def __init__(self, metrics: SamplerMetrics) -> None:
        self._metrics = metrics
        self._calls: dict[object, tuple[str, float]] = {}
        """What runs now and since when, the oldest first."""
        self._ended = time.monotonic()
        """When a call last came to its end."""

    @property
    def progress(self) -> float:
        """time.monotonic when something last went on: now, while a call runs that has not run for long."""
        now = time.monotonic()
        _, newest = next(reversed(self._calls.values()), ("", -math.inf))
        return now if now - newest < WORK_SECONDS else self._ended

    @property
    def running(self) -> Want | None:
        """The call of engine or environment that runs for the longest time."""
        for part, began in self._calls.values():
            return Want(part, f"the {part}, which is in the middle of a turn", began)
        return None

    @contextlib.contextmanager
    def turn(self, part: str, bill: Bill) -> Generator[None]:
        """Charge the seconds of the block, failed or not."""
        began, call = time.monotonic(), object()
        self._calls[call] = (part, began)
        try:
            yield
            self._ended = time.monotonic()
        finally:
            del self._calls[call]
            seconds = time.monotonic() - began
            bill.charge(Cost(seconds=seconds))
            self._metrics.turn.labels(part).observe(seconds)
