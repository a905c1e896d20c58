"""Retries of engine and environment calls: failures a few times, unavailability once the part is available again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from services.sampler.expansion.availability import AvailabilityMonitor, CallTimings
from services.sampler.expansion.lease_control import LeaseControl
from treegrpo.errors import AwayError, EngineError, ToolError
from treegrpo.observability.metrics import SamplerMetrics

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class CallRetrier:
    """Retries calls with exponential back-off."""

    def __init__(self, retries: int, metrics: SamplerMetrics, timings: CallTimings | None = None) -> None:
        """``retries``: after the first attempt."""
        self._metrics = metrics
        self._timings = timings or CallTimings()
        self._retry_backoff = replace(self._timings.retry_backoff, retries=retries)

    async def call_with_retries(
        self, attempt: Callable[[], Awaitable[Result]], availability: AvailabilityMonitor, control: LeaseControl
    ) -> Result:
        """The result of the first attempt that succeeds.

        Raises:
            DeadlineError: the part was unavailable for longer than the wait limit, or the lease was stopped meanwhile.
            EngineError, ToolError: the last attempt's.
        """
        retries = self._retry_backoff.schedule()
        outage_retries = self._timings.outage_backoff.schedule()
        first_outage = 0.0
        while True:
            try:
                return await attempt()
            except (EngineError, ToolError) as error:
                self._metrics.errors.labels(type(error).__name__).inc()
                if isinstance(error, AwayError):
                    first_outage = first_outage or time.monotonic()
                    if await availability.wait_out_outage(error, control, outage_retries, first_outage):
                        continue
                if (pause := retries.next_delay()) is None:
                    log.warning("a branch failed after %d attempts: %s", retries.failures + 1, error)
                    raise
                log.warning("retrying in %.1f s: %s", pause, error)
                await asyncio.sleep(pause)

    async def with_timeout(self, work: Awaitable[Result], error: type[EngineError | ToolError], who: str) -> Result:
        """Await ``work`` for one attempt's time at most. Raises ``error`` afterwards."""
        seconds = self._timings.attempt_timeout
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                return await work
        except TimeoutError as timeout:
            if not scope.expired():  # the work's own
                raise
            raise error(f"{who} did not answer within {seconds:.0f} s; see its log.") from timeout
