"""Trying again: what failed, a few times; what met something that is away, when that is back."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.sampler.expansion.availability import Outage
from services.sampler.expansion.lease_control import Gate
from treegrpo.errors import AwayError, EngineError, ToolError
from treegrpo.observability.metrics import SamplerMetrics

log = logging.getLogger(__name__)
FIRST_WAIT_SECONDS = 0.1
"""Before the first retry; doubles with each."""
LONGEST_WAIT_SECONDS = 5.0
ATTEMPT_SECONDS = 600.0
"""The longest one attempt of an engine or an environment may take, whatever its own time-outs."""
Result = TypeVar("Result")


class Retries:
    def __init__(self, times: int, metrics: SamplerMetrics) -> None:
        """``times``: after the first attempt."""
        self._times = times
        self._metrics = metrics

    async def run(self, attempt: Callable[[], Awaitable[Result]], outage: Outage, gate: Gate) -> Result:
        """The result of the first attempt that succeeds.

        Raises:
            DeadlineError: what it needs was away for too long, or the lease came to its end meanwhile.
            EngineError, ToolError: the last attempt's.
        """
        failed = met = 0
        since = 0.0
        while True:
            try:
                return await attempt()
            except (EngineError, ToolError) as error:
                self._metrics.errors.labels(type(error).__name__).inc()
                if isinstance(error, AwayError):
                    since = since or time.monotonic()
                    met += 1
                    if await outage.sit_out(error, gate, _pause(met) * random.uniform(0.5, 1.0), since):
                        continue
                failed += 1
                if failed > self._times:
                    log.warning("a branch is left out after %d attempts: %s", failed, error)
                    raise
                log.warning("trying again in %.1f s: %s", _pause(failed), error)
                await asyncio.sleep(_pause(failed))


async def within(work: Awaitable[Result], error: type[EngineError | ToolError], who: str) -> Result:
    """Wait ATTEMPT_SECONDS for ``work`` at most. Raises ``error`` afterwards."""
    scope = asyncio.timeout(ATTEMPT_SECONDS)
    try:
        async with scope:
            return await work
    except TimeoutError as late:
        if not scope.expired():  # the work's own
            raise
        raise error(f"{who} did not answer within {ATTEMPT_SECONDS:.0f} s; see its log.") from late


def _pause(number: int) -> float:
    return min(FIRST_WAIT_SECONDS * 2 ** (number - 1), LONGEST_WAIT_SECONDS)
