"""Stall detection: reports what a sampler waits for when it makes no progress.

Each part reports what it waits for on request. The reason goes to the learner with the heartbeats, to the log
whenever it changes, and to a gauge.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treegrpo.core.lease import HEARTBEAT_SECONDS
from treegrpo.observability.metrics import SamplerMetrics

log = logging.getLogger(__name__)
STALL_SECONDS = HEARTBEAT_SECONDS
"""Seconds without progress after which a sampler counts as stalled."""


@dataclass(frozen=True, slots=True)
class WaitReason:
    """The reason for a wait."""

    part: str
    """One word for the metric."""
    what: str
    """As it follows "waits for"."""
    since: float
    """time.monotonic."""


class StallMonitor:
    """Collects the wait reasons of all parts, and reports the first one that blocks the sampler."""

    def __init__(
        self,
        wait_reasons: Callable[[], Sequence[WaitReason | None]],
        last_progress: Callable[[], float],
        metrics: SamplerMetrics,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        """Set up the monitor.

        Args:
            wait_reasons: what each part waits for now; what holds up the others comes first.
            last_progress: time.monotonic of the last progress.
            metrics: where the gauge is.
            stall_seconds: without progress, before a reason counts.
        """
        self._wait_reasons = wait_reasons
        self._last_progress = last_progress
        self._metrics = metrics
        self._stall_seconds = stall_seconds
        self._logged_part = ""

    def current_stall(self) -> WaitReason | None:
        """What the sampler is stalled on; None while it makes progress."""
        now, progress = time.monotonic(), self._last_progress()
        for reason in self._wait_reasons():
            if reason is not None and now - max(reason.since, progress) >= self._stall_seconds:
                return reason
        return None

    def report_stall(self) -> None:
        """Update the gauge, and log when a stall begins, changes or ends."""
        reason = self.current_stall()
        self._metrics.stalled.clear()
        if reason is not None:
            self._metrics.stalled.labels(reason.part).set(time.monotonic() - reason.since)
        part = "" if reason is None else reason.part
        if reason is not None and part != self._logged_part:
            log.warning("stalled: waiting for %s, for %.0f s", reason.what, time.monotonic() - reason.since)
        elif reason is None and self._logged_part:
            log.info("no longer stalled")
        self._logged_part = part
