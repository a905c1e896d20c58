"""The watchdog: when nothing goes on here, what for want of.

Each part that waits for something says so when it is asked; nobody reports. The learner hears it with the heartbeats,
the log has a line whenever it changes, and a gauge has the seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treegrpo.core.lease import HEARTBEAT_SECONDS
from treegrpo.observability.metrics import SamplerMetrics

log = logging.getLogger(__name__)
QUIET_SECONDS = HEARTBEAT_SECONDS
"""Without progress for so long, it is worth while to say what is waited for."""


@dataclass(frozen=True, slots=True)
class Want:
    """Something that is waited for."""

    part: str
    """One word for the metric."""
    what: str
    """As it follows "waits for"."""
    since: float
    """time.monotonic."""


class Watch:
    """Asks the parts what they wait for."""

    def __init__(
        self, wants: Callable[[], Sequence[Want | None]], progress: Callable[[], float], metrics: SamplerMetrics
    ) -> None:
        """Set up the watch.

        Args:
            wants: what each part waits for now; what holds up the others comes first.
            progress: time.monotonic when something last went on.
            metrics: where the gauge is.
        """
        self._wants = wants
        self._progress = progress
        self._metrics = metrics
        self._said = ""

    def now(self) -> Want | None:
        """What nothing goes on without; None while something does."""
        now, progress = time.monotonic(), self._progress()
        for want in self._wants():
            if want is not None and now - max(want.since, progress) >= QUIET_SECONDS:
                return want
        return None

    def look(self) -> None:
        """Show in log and metrics what is waited for now."""
        want = self.now()
        self._metrics.stalled.clear()
        if want is not None:
            self._metrics.stalled.labels(want.part).set(time.monotonic() - want.since)
        part = "" if want is None else want.part
        if want is not None and part != self._said:
            log.warning("nothing goes on here: waiting for %s, for %.0f s", want.what, time.monotonic() - want.since)
        elif want is None and self._said:
            log.info("work goes on")
        self._said = part
