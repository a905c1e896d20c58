"""Tools and engines that are away: everybody waits together for one probe, and goes on as if nothing had happened.

    call ─► AwayError ─► suspected ─► probe ─► it answers: the call itself may be at fault
                                        │
                                        └─► it does not: away ─► probe, probe, … ─► it answers: the call is made again
                                                                    └─► PATIENCE_SECONDS, or the word to stop: left out

An outage costs neither tries nor budget, and no question is blamed for it: what is left out is for another lease.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from services.sampler.expansion.lease_control import Gate
from services.sampler.expansion.stall_monitor import Want
from treegrpo.errors import AwayError, DeadlineError, describe
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.notifier import Notifier

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 60.0
"""The longest a branch waits. Leases end then, so that a sampler whose tools are there can go on with them: a service
restarts within this time, and what it costs is the episodes that wait."""
PROBE_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Before the next probe, at most."""
ANSWER_SECONDS = 60.0
"""The longest a probe may take, whatever its own time-outs."""


@dataclass(slots=True, eq=False)
class Spell:
    """One time that a part is away, or is suspected to be."""

    error: AwayError
    since: float = field(default_factory=time.monotonic)
    metered: float = field(default_factory=time.monotonic)
    """Up to when its seconds are counted."""
    confirmed: bool = False
    """A probe failed as well."""
    probes: int = 0
    due: float = 0.0
    """time.monotonic of the next probe."""


class Outage:
    """Whether one part, the engine or the environment's tools, is away. Shared by all branches of a sampler."""

    def __init__(self, probe: Callable[[], Awaitable[None]], metrics: SamplerMetrics) -> None:
        """``probe`` raises AwayError while the part is away."""
        self._probe = probe
        self._metrics = metrics
        self._probing = asyncio.Lock()
        self._suspected = Notifier()
        self._spell: Spell | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when `away` changes."""

    @property
    def away(self) -> bool:
        """Whether nothing that needs it should be begun."""
        return self._spell is not None and self._spell.confirmed

    @property
    def given_up(self) -> bool:
        """Whether it is away for so long that nobody waits any more."""
        return self._spell is not None and self.away and time.monotonic() > self._spell.since + PATIENCE_SECONDS

    @property
    def want(self) -> Want | None:
        """What is waited for, while it is away or has not yet answered the first probe."""
        if self._spell is None:
            return None
        error = self._spell.error
        return Want(error.part, f"{error.what}, which {error.reason}", self._spell.since)

    def suspect(self, error: AwayError) -> Spell:
        """Note that it did not answer."""
        if self._spell is None:
            self._spell = Spell(error)
            self._suspected.notify()
        return self._spell

    async def sit_out(self, error: AwayError, gate: Gate, pause: float, since: float) -> bool:
        """Wait for ``pause`` seconds, and until it answers; whether it was away, so that the call is not to blame.

        Raises:
            DeadlineError: it was away for too long, now or in all ``since`` (time.monotonic), or the lease has to end.
        """
        spell = self.suspect(error)
        until = min(since, spell.since) + PATIENCE_SECONDS
        try:
            async with gate.waiting(max(0.0, until - time.monotonic())):
                await asyncio.sleep(pause)
                await self.over()
        except TimeoutError:
            seconds = time.monotonic() - min(since, spell.since)
            raise DeadlineError(f"{spell.error}; it was waited for {seconds:.0f} s long.") from error
        return spell.confirmed or error.certain

    async def over(self) -> None:
        """Return when it answers. Whoever comes first probes for all; if that one leaves, another goes on."""
        async with self._probing:
            while (spell := self._spell) is not None:
                await asyncio.sleep(max(0.0, spell.due - time.monotonic()))
                await self._ask(spell)

    async def watch(self) -> None:
        """Probe whenever it is suspected to be away, for ever, so that it is noticed when it is back and nobody waits."""
        while True:
            if self._spell is None:
                await self._suspected.wait()
            await self.over()

    async def _ask(self, spell: Spell) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._probe()
        except (AwayError, TimeoutError) as error:
            self._silent(spell, error)
        except Exception as error:  # noqa: BLE001  # it answers, if in its own way: who needs it will see
            log.info("%s answers a probe with %s: %s", spell.error.what, type(error).__name__, describe(error))
            self._back(spell)
        else:
            self._back(spell)
        finally:
            now = time.monotonic()
            self._metrics.away.labels(spell.error.part).inc(now - spell.metered)
            spell.metered = now

    def _silent(self, spell: Spell, error: AwayError | TimeoutError) -> None:
        most = PROBE_SECONDS[min(spell.probes, len(PROBE_SECONDS) - 1)]
        spell.due = time.monotonic() + most * random.uniform(0.5, 1.0)  # many samplers do not ask at the same moment
        spell.probes += 1
        if isinstance(error, AwayError):
            spell.error = error
        if not spell.confirmed:
            spell.confirmed = True
            log.warning("%s; what needs it waits, and no more leases are asked for", spell.error)
            self.on_change()

    def _back(self, spell: Spell) -> None:
        self._spell = None
        if spell.confirmed:
            log.info("%s answers again, after %.1f s", spell.error.what, time.monotonic() - spell.since)
            self.on_change()
