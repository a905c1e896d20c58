"""Availability of the engine and of the environment's tools: one shared probe decides when failed calls are made again.

    call ─► AwayError ─► suspected ─► probe ─► it answers: the call itself may be at fault
                                        │
                                        └─► no answer: unavailable ─► probe, probe, … ─► it answers: the call is repeated
                                                          └─► wait limit, or the lease is stopped: the branch is returned

An outage costs neither retries nor budget, and does not count against a question: the branch goes back to the learner,
which leases it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from services.sampler.expansion.lease_control import LeaseControl
from services.sampler.expansion.stall_monitor import WaitReason
from treegrpo.errors import AwayError, DeadlineError, describe
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff, RetrySchedule
from treegrpo.timing.notifier import Notifier

log = logging.getLogger(__name__)
PROBE_BACKOFF = Backoff((0.1, 0.2, 0.5, 1.0, 2.0, 5.0), jitter=0.5)
RETRY_BACKOFF = Backoff.exponential(0.1, 5.0)
OUTAGE_JITTER = 0.5


@dataclass(frozen=True, slots=True)
class CallTimings:
    """How long calls of engine and environment may take, and how they are retried; in seconds."""

    wait_limit: float = 60.0
    """The longest a branch waits for something unavailable. Leases end then, so that a sampler whose tools are available
    can continue with them: a service restarts within this time, and only the waiting episodes are lost."""
    probe_backoff: Backoff = PROBE_BACKOFF
    """Between probes; the jitter keeps many samplers from probing at the same moment."""
    probe_timeout: float = 60.0
    """The longest a probe may take, independent of its own time-outs."""
    retry_backoff: Backoff = RETRY_BACKOFF
    """Between attempts of a call that failed."""
    attempt_timeout: float = 600.0
    """The longest one attempt of an engine or environment call may take, independent of its own time-outs."""

    @property
    def outage_backoff(self) -> Backoff:
        """Between attempts of a call that met an outage: `retry_backoff` with jitter, since all branches meet the same one."""
        return replace(self.retry_backoff, jitter=OUTAGE_JITTER)


@dataclass(slots=True, eq=False)
class Outage:
    """One period in which a part is unavailable, or is suspected to be."""

    error: AwayError
    probes: RetrySchedule
    since: float = field(default_factory=time.monotonic)
    metered_until: float = field(default_factory=time.monotonic)
    """Up to when its seconds are counted in the metric."""
    confirmed: bool = False
    """A probe failed as well."""
    next_probe: float = 0.0
    """time.monotonic of the next probe."""


class AvailabilityMonitor:
    """Tells whether one part, the engine or the environment's tools, is available. Shared by all branches of a sampler."""

    def __init__(self, probe: Callable[[], Awaitable[None]], metrics: SamplerMetrics, timings: CallTimings | None = None) -> None:
        """``probe`` raises AwayError while the part is unavailable."""
        self._probe = probe
        self._metrics = metrics
        self._timings = timings or CallTimings()
        self._probing = asyncio.Lock()
        self._outage_began = Notifier()
        self._outage: Outage | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when `unavailable` changes."""

    @property
    def unavailable(self) -> bool:
        """Whether a probe failed, so that nothing that needs the part should be started."""
        return self._outage is not None and self._outage.confirmed

    @property
    def wait_limit_passed(self) -> bool:
        """Whether the part has been unavailable for longer than any branch waits."""
        return self._outage is not None and self.unavailable and time.monotonic() > self._outage.since + self._timings.wait_limit

    @property
    def wait_reason(self) -> WaitReason | None:
        """What callers wait for during an outage, suspected or confirmed."""
        if self._outage is None:
            return None
        error = self._outage.error
        return WaitReason(error.part, f"{error.what}, which {error.reason}", self._outage.since)

    def report_failure(self, error: AwayError) -> Outage:
        """Record that the part did not answer a call; begins an outage unless there is one."""
        if self._outage is None:
            self._outage = Outage(error, self._timings.probe_backoff.schedule())
            self._outage_began.notify()
        return self._outage

    async def wait_out_outage(self, error: AwayError, control: LeaseControl, retries: RetrySchedule, since: float) -> bool:
        """Wait the next delay of ``retries``, then until the part is available; returns whether the outage explains the failure.

        Raises:
            DeadlineError: the outage, or all outages ``since`` (time.monotonic), took longer than the wait limit, or the
                lease was stopped.
        """
        outage = self.report_failure(error)
        until = min(since, outage.since) + self._timings.wait_limit
        try:
            async with control.wait_scope(max(0.0, until - time.monotonic())):
                await retries.sleep()
                await self.wait_available()
        except TimeoutError:
            seconds = time.monotonic() - min(since, outage.since)
            raise DeadlineError(f"{outage.error}; waited {seconds:.0f} s for it.") from error
        return outage.confirmed or error.certain

    async def wait_available(self) -> None:
        """Return when the part is available. The first caller probes for all; when it is cancelled, another takes over."""
        async with self._probing:
            while (outage := self._outage) is not None:
                await asyncio.sleep(max(0.0, outage.next_probe - time.monotonic()))
                await self._probe_once(outage)

    async def run_probes(self) -> None:
        """Probe during every outage until cancelled, so that its end is noticed even when no branch waits."""
        while True:
            if self._outage is None:
                await self._outage_began.wait()
            await self.wait_available()

    async def _probe_once(self, outage: Outage) -> None:
        try:
            async with asyncio.timeout(self._timings.probe_timeout):
                await self._probe()
        except (AwayError, TimeoutError) as error:
            self._record_failed_probe(outage, error)
        except Exception as error:  # noqa: BLE001  # it answers, if with an error: callers will see for themselves
            log.info("%s answered a probe with %s: %s", outage.error.what, type(error).__name__, describe(error))
            self._end_outage(outage)
        else:
            self._end_outage(outage)
        finally:
            now = time.monotonic()
            self._metrics.away.labels(outage.error.part).inc(now - outage.metered_until)
            outage.metered_until = now

    def _record_failed_probe(self, outage: Outage, error: AwayError | TimeoutError) -> None:
        delay = outage.probes.next_delay() or 0.0  # its policy has no limit, so there is always one
        outage.next_probe = time.monotonic() + delay
        if isinstance(error, AwayError):
            outage.error = error
        if not outage.confirmed:
            outage.confirmed = True
            log.warning("%s; branches that need it wait, and the sampler requests no more leases", outage.error)
            self.on_change()

    def _end_outage(self, outage: Outage) -> None:
        self._outage = None
        if outage.confirmed:
            log.info("%s is available again after %.1f s", outage.error.what, time.monotonic() - outage.since)
            self.on_change()
