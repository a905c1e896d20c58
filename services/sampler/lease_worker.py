"""The leases this sampler holds: each is a task that grows its trees and says how it ended."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass

from services.sampler.engines.base import Engine
from services.sampler.expansion.expander import Expander
from services.sampler.expansion.lease_control import Gate
from services.sampler.expansion.stall_monitor import Watch
from services.sampler.learner_link.rollout_client import LearnerClient
from services.sampler.learner_link.weight_sync import Follower
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.errors import ContractError, DeadlineError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.notifier import Notifier
from treegrpo.v1 import rollout_pb2
from treegrpo.wire.codec import lease_from_pb, plan_from_pb, version_from_pb, version_to_pb

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a sampler says about itself."""

    id: str
    incarnation: int
    engine: str
    capacity: int
    """Generations its engine runs at once."""


class LeaseHolder:
    """Works on leases as `LearnerClient` brings them. Its tasks belong to the task group it is given."""

    def __init__(
        self,
        identity: Identity,
        engine: Engine,
        expander: Expander,
        follower: Follower,
        client: LearnerClient,
        watch: Watch,
        metrics: SamplerMetrics,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._identity = identity
        self._engine = engine
        self._expander = expander
        self._follower = follower
        self._client = client
        self._watch = watch
        self._metrics = metrics
        self._tasks = tasks
        self._held: dict[str, tuple[Gate, asyncio.Task[None]]] = {}
        self._changed = Notifier()
        self._running = asyncio.Event()
        self._running.set()
        self._idle_since: float | None = time.monotonic()
        self.draining = asyncio.Event()
        """Set once nothing new may be begun here."""
        self._enough = 0
        """Leases that fill the engine; 0 before a learner has said how large they are."""
        for outage in expander.outages:
            outage.on_change = self._ask

    # ---- what the learner says

    def hello(self) -> rollout_pb2.Hello:
        """See `Holder`."""
        me = self._identity
        leases = sorted({*self._held, *self._client.leases})
        version = version_to_pb(self._engine.version)
        return rollout_pb2.Hello(
            sampler=me.id, incarnation=me.incarnation, engine=me.engine, capacity=me.capacity, version=version, leases=leases
        )

    def heartbeat(self) -> rollout_pb2.Heartbeat:
        """See `Holder`."""
        beat = rollout_pb2.Heartbeat(version=version_to_pb(self._engine.version))
        if (want := self._watch.now()) is not None:
            beat.waits_for, beat.waited_seconds = want.what, time.monotonic() - want.since
        return beat

    def welcomed(self, welcome: rollout_pb2.Welcome) -> None:
        """See `Holder`. Enough leases to fill the engine are asked for, and one more so that it never runs dry."""
        for lease in welcome.void_leases:
            if lease in self._held:
                log.info("lease %s is void: it went to another sampler, and so does what is not finished here", lease)
                self._held[lease][1].cancel()
        if welcome.HasField("version"):
            self._follower.hear(version_from_pb(welcome.version))
        plan = plan_from_pb(welcome.plan)
        self._enough = math.ceil(self._identity.capacity / plan.width) + 1
        self._client.bound(self._enough, plan)
        self._ask()

    def leased(self, lease: rollout_pb2.Lease) -> None:
        """See `Holder`. A lease that is held already changes nothing."""
        if lease.id in self._held:
            return
        try:
            granted = lease_from_pb(lease)
        except ContractError as error:
            self._metrics.errors.labels(type(error).__name__).inc()
            self._client.end(LeaseEnd(lease.id, LeaseEndReason.FAILED, error=str(error)))
            return
        gate = Gate(self._running)
        if self.draining.is_set():
            gate.stop()
        task = self._tasks.create_task(self._work(granted, gate), name=f"lease {granted.id}")
        self._held[granted.id] = (gate, task)
        task.add_done_callback(lambda _: self._dropped(granted.id))
        self.count_waiting()
        self._idle_since = None
        self._metrics.leases.set(len(self._held))

    def stop_expanding(self, lease: str) -> None:
        """See `Holder`."""
        if lease in self._held:
            self._held[lease][0].stop()

    # ---- what the run says

    def pause(self) -> None:
        """Begin no turn until `resume`."""
        if not self.draining.is_set():
            self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def drain(self) -> None:
        """Finish the branches that run, begin nothing, take no more leases."""
        self.draining.set()
        self._running.set()
        self._ask()
        for gate, _ in self._held.values():
            gate.stop()

    async def drained(self, seconds: float) -> None:
        """Return when no lease is held any more. What still runs after ``seconds`` is left out, for another sampler."""
        deadline = time.monotonic() + seconds
        while self._held and await self._changed.wait(deadline):
            pass
        for gate, _ in self._held.values():
            gate.cut()
        while self._held:
            await self._changed.wait()

    def count_waiting(self) -> None:
        """Bring the counter of seconds without any lease up to now."""
        if self._idle_since is not None:
            now = time.monotonic()
            self._metrics.waiting.inc(now - self._idle_since)
            self._idle_since = now

    def _ask(self) -> None:
        """Say how many leases are wanted: none while the engine or a tool is away."""
        away = any(outage.away for outage in self._expander.outages)
        self._client.demand(0 if away or self.draining.is_set() else self._enough)

    async def _work(self, lease: Lease, gate: Gate) -> None:
        try:
            async with gate.waiting():
                await self._follower.serves(lease.min_version)
        except DeadlineError as error:
            self._metrics.errors.labels(type(error).__name__).inc()
            end = _untouched(lease, str(error))
        except TimeoutError:
            end = _untouched(lease, f"its sampler waited for policy version {lease.min_version} when it had to stop")
        else:
            end = await self._expander.grow(lease, self._client.send, gate)
        self._client.end(end)

    def _dropped(self, lease: str) -> None:
        del self._held[lease]
        self._metrics.leases.set(len(self._held))
        if not self._held:
            self._idle_since = time.monotonic()
        self._changed.notify()


def _untouched(lease: Lease, why: str) -> LeaseEnd:
    """The end of a lease on which nothing was done."""
    return LeaseEnd(lease.id, LeaseEndReason.RETURNED, lease.plan.leaves - lease.plan.trees, error=why)
