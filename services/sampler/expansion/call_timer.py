"""Times calls of engine and environment, and records which are in flight and when one last finished."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator

from services.sampler.expansion.lease_budget import BranchCostMeter
from services.sampler.expansion.stall_monitor import WaitReason
from treegrpo.core.budget import Cost
from treegrpo.observability.metrics import SamplerMetrics

LONG_CALL_SECONDS = 60.0
"""A call may take this long before it counts as a stall."""


class CallTimer:
    """Measures calls of engine and environment; a finished call, and a recent one in flight, are progress."""

    def __init__(self, metrics: SamplerMetrics) -> None:
        self._metrics = metrics
        self._calls: dict[object, tuple[str, float]] = {}
        """Part and start of each call in flight, the oldest first."""
        self._last_finished = time.monotonic()

    @property
    def last_progress(self) -> float:
        """time.monotonic of the last progress: now, while the newest call in flight is younger than LONG_CALL_SECONDS."""
        now = time.monotonic()
        _, newest = next(reversed(self._calls.values()), ("", -math.inf))
        return now if now - newest < LONG_CALL_SECONDS else self._last_finished

    @property
    def longest_call(self) -> WaitReason | None:
        """The call in flight that began first, as something to wait for."""
        for part, began in self._calls.values():
            return WaitReason(part, f"the {part}, which is in the middle of a turn", began)
        return None

    @contextlib.contextmanager
    def time_call(self, part: str, meter: BranchCostMeter) -> Generator[None]:
        """Charge the seconds of the block to ``meter``, whether it fails or not."""
        began, call = time.monotonic(), object()
        self._calls[call] = (part, began)
        try:
            yield
            self._last_finished = time.monotonic()
        finally:
            del self._calls[call]
            seconds = time.monotonic() - began
            meter.charge(Cost(seconds=seconds))
            self._metrics.turn.labels(part).observe(seconds)
