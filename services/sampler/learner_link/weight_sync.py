"""Keeps the engine at the learner's newest policy version.

announced ─► describe the newest ─► fetch what changed ─► SHA-256 ─► engine.load_weights ─► served
   ▲                                   └─ unchanged files are linked      │
   └──────────── versions that were superseded meanwhile are skipped ◄────┘
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from services.sampler.engines.base import Engine
from services.sampler.expansion.stall_monitor import WaitReason
from services.sampler.learner_link.weight_store import WeightStore
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import DeadlineError, UnavailableError, WeightsError, describe
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.timing.notifier import Notifier
from treegrpo.wire.codec import version_from_pb

log = logging.getLogger(__name__)
FIRST_VERSION_BACKOFF = Backoff((0.5,), seconds=300.0)
"""For a learner that has no version yet."""
UPDATE_BACKOFF = Backoff((0.2, 1.0, 2.0, 5.0, 10.0))
REFUSED_BACKOFF = Backoff((5.0, 60.0, 300.0))


@dataclass(frozen=True, slots=True)
class SyncTimings:
    """Back-offs of weight updates, and the longest that a lease waits for one."""

    update: Backoff = UPDATE_BACKOFF
    """Before the newest version is asked for again, after an update failed."""
    refused: Backoff = REFUSED_BACKOFF
    """Before a version that the engine refused is offered to it again. Its files arrived whole, so most likely it is refused
    for their content, and each offer pauses the engine in vain; but a file system that servers share may show them late,
    and memory may be freed."""
    version_wait: float = 600.0
    """The longest a lease waits for the version it needs, in seconds."""


class WeightSync:
    """Loads the newest announced version into the engine."""

    def __init__(self, store: WeightStore, engine: Engine, metrics: SamplerMetrics, timings: SyncTimings | None = None) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._timings = timings or SyncTimings()
        self._newest = engine.version
        self._refused: PolicyVersion | None = None
        """The version that the engine refused last."""
        self._refusals = 0
        """Times it had refused it before."""
        self._refused_until = 0.0
        """When it is offered again, in time.monotonic."""
        self._announced = Notifier()
        self._loaded = Notifier()
        self._waiting: dict[object, WaitReason] = {}
        """Of each lease that needs a later version, the oldest first."""
        metrics.version.set(engine.version.step)

    def note_announcement(self, version: PolicyVersion | None) -> None:
        """Note an announcement of ``version``. Announcing it twice changes nothing."""
        if version is not None and version != self._newest:
            self._newest = version
            self._announced.notify()

    @property
    def wait_reason(self) -> WaitReason | None:
        """The version that a lease has waited for the longest."""
        return next(iter(self._waiting.values()), None)

    async def wait_for_version(self, version: PolicyVersion) -> None:
        """Return once the engine serves ``version`` or a later one. Raises DeadlineError after `SyncTimings.version_wait`."""
        if self._engine.version < version:
            self.note_announcement(version)
        began, lease, limit = time.monotonic(), object(), self._timings.version_wait
        self._waiting[lease] = WaitReason("weights", f"policy version {version} from the learner", began)
        try:
            while self._engine.version < version:
                if not await self._loaded.wait(began + limit):
                    raise DeadlineError(
                        f"The engine still serves version {self._engine.version}, not {version}, after {limit:.0f} s; "
                        "see this sampler's log for why the weights do not arrive."
                    )
        finally:
            del self._waiting[lease]

    async def follow_versions(self) -> None:
        """Update the engine until cancelled. A failed update is counted, and repeated with the newest version then."""
        failures = 0
        while True:
            if self._newest == self._engine.version:
                await self._announced.wait()
            try:
                await self.update_engine()
                failures = 0
            except (WeightsError, UnavailableError, OSError) as error:  # the last: a disk that is full
                delay = self._timings.update.delay(failures)
                failures += 1
                self._metrics.errors.labels(type(error).__name__).inc()
                self._metrics.not_updated.labels(type(error).__name__).inc()
                log.warning("weight update failed, retrying in %.1f s: %s", delay, describe(error))
                await asyncio.sleep(delay)

    async def update_engine(self) -> None:
        """Load the learner's newest version. An announcement is only a hint to ask the learner which it is."""
        asked = self._newest
        described = await self._store.describe_newest()
        version = version_from_pb(described.version)
        if self._newest == asked:  # else something was announced meanwhile, and is asked for next
            self._newest = version
        if version == self._refused and time.monotonic() < self._refused_until:
            if self._newest == version:
                await self._announced.wait(self._refused_until)
        elif version != self._engine.version:
            await self._load_weights(version, await self._store.fetch_version(described))

    async def _load_weights(self, version: PolicyVersion, path: Path) -> None:
        try:
            with self._metrics.swap.time():
                await self._engine.load_weights(version, path)
        except WeightsError:
            self._refusals = self._refusals + 1 if version == self._refused else 0
            delay = self._timings.refused.delay(self._refusals)
            self._refused, self._refused_until = version, time.monotonic() + delay
            log.warning("the engine refused version %s; it is offered again in %.0f s, a newer one at once", version, delay)
            raise
        self._metrics.version.set(version.step)
        log.info("serving version %s", version)
        self._loaded.notify()


async def fetch_first_version(store: WeightStore, backoff: Backoff = FIRST_VERSION_BACKOFF) -> tuple[PolicyVersion, Path]:
    """Wait for the learner's first version and fetch it. Raises the last error once ``backoff`` ends."""
    retries, logged = backoff.schedule(), ""
    while True:
        try:
            described = await store.describe_newest()
            return version_from_pb(described.version), await store.fetch_version(described)
        except (WeightsError, UnavailableError) as error:
            if (delay := retries.next_delay()) is None:
                raise
            if str(error) != logged:
                logged = str(error)
                log.info("waiting for the first policy version: %s", logged)
            await asyncio.sleep(delay)
