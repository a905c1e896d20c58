"""Works on the leases that this sampler holds: each is a task that expands its trees and reports how it ended."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass

from services.sampler.engines.base import Engine
from services.sampler.expansion.expander import Expander
from services.sampler.expansion.lease_control import LeaseControl
from services.sampler.expansion.stall_monitor import StallMonitor
from services.sampler.learner_link.rollout_client import RolloutClient
from services.sampler.learner_link.weight_sync import WeightSync
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.errors import ContractError, DeadlineError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.notifier import Notifier
from treegrpo.v1 import rollout_pb2
from treegrpo.wire.codec import lease_from_pb, plan_from_pb, version_from_pb, version_to_pb

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplerIdentity:
    """The identity of a sampler, as in its Hello."""

    id: str
    incarnation: int
    engine: str
    capacity: int
    """Generations its engine runs at once."""


class LeaseWorker:
    """Works on the leases that `RolloutClient` receives. Its tasks belong to the task group it is given."""

    def __init__(
        self,
        identity: SamplerIdentity,
        engine: Engine,
        expander: Expander,
        weight_sync: WeightSync,
        client: RolloutClient,
        stall_monitor: StallMonitor,
        metrics: SamplerMetrics,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._identity = identity
        self._engine = engine
        self._expander = expander
        self._weight_sync = weight_sync
        self._client = client
        self._stall_monitor = stall_monitor
        self._metrics = metrics
        self._tasks = tasks
        self._leases: dict[str, tuple[LeaseControl, asyncio.Task[None]]] = {}
        self._lease_ended = Notifier()
        self._running = asyncio.Event()
        self._running.set()
        self._idle_since: float | None = time.monotonic()
        self.draining = asyncio.Event()
        """Set once nothing new may be started here."""
        self._full_demand = 0
        """Leases that fill the engine; 0 before a learner has said how large they are."""
        for monitor in expander.availability_monitors:
            monitor.on_change = self._update_demand

    # ---- messages of the learner: see `LeaseHandler`

    def build_hello(self) -> rollout_pb2.Hello:
        """See `LeaseHandler`."""
        me = self._identity
        leases = sorted({*self._leases, *self._client.leases})
        version = version_to_pb(self._engine.version)
        return rollout_pb2.Hello(
            sampler=me.id, incarnation=me.incarnation, engine=me.engine, capacity=me.capacity, version=version, leases=leases
        )

    def build_heartbeat(self) -> rollout_pb2.Heartbeat:
        """See `LeaseHandler`."""
        beat = rollout_pb2.Heartbeat(version=version_to_pb(self._engine.version))
        if (stall := self._stall_monitor.current_stall()) is not None:
            beat.waits_for, beat.waited_seconds = stall.what, time.monotonic() - stall.since
        return beat

    def handle_welcome(self, welcome: rollout_pb2.Welcome) -> None:
        """See `LeaseHandler`. Requests enough leases to fill the engine, and one more so that it never runs dry."""
        for lease in welcome.void_leases:
            if lease in self._leases:
                log.info("lease %s is void: the learner gave it to another sampler; its unfinished branches are cancelled", lease)
                self._leases[lease][1].cancel()
        if welcome.HasField("version"):
            self._weight_sync.note_announcement(version_from_pb(welcome.version))
        plan = plan_from_pb(welcome.plan)
        self._full_demand = math.ceil(self._identity.capacity / plan.width) + 1
        self._client.limit_unacked(self._full_demand, plan)
        self._update_demand()

    def handle_lease(self, lease: rollout_pb2.Lease) -> None:
        """See `LeaseHandler`. A lease that is held already changes nothing."""
        if lease.id in self._leases:
            return
        try:
            granted = lease_from_pb(lease)
        except ContractError as error:
            self._metrics.errors.labels(type(error).__name__).inc()
            self._client.send_lease_end(LeaseEnd(lease.id, LeaseEndReason.FAILED, error=str(error)))
            return
        control = LeaseControl(self._running)
        if self.draining.is_set():
            control.stop_expanding()
        task = self._tasks.create_task(self._run_lease(granted, control), name=f"lease {granted.id}")
        self._leases[granted.id] = (control, task)
        task.add_done_callback(lambda _: self._forget_lease(granted.id))
        self.count_idle_seconds()
        self._idle_since = None
        self._metrics.leases.set(len(self._leases))

    def stop_lease(self, lease: str) -> None:
        """See `LeaseHandler`."""
        if lease in self._leases:
            self._leases[lease][0].stop_expanding()

    # ---- run state

    def pause(self) -> None:
        """Start no turn until `resume`."""
        if not self.draining.is_set():
            self._running.clear()

    def resume(self) -> None:
        """End a pause."""
        self._running.set()

    def drain(self) -> None:
        """Finish running branches, start no new ones, take no more leases."""
        self.draining.set()
        self._running.set()
        self._update_demand()
        for control, _ in self._leases.values():
            control.stop_expanding()

    async def wait_drained(self, seconds: float) -> None:
        """Return when no lease is held any more. What still runs after ``seconds`` is cancelled, for another sampler."""
        deadline = time.monotonic() + seconds
        while self._leases and await self._lease_ended.wait(deadline):
            pass
        for control, _ in self._leases.values():
            control.cancel_running()
        while self._leases:
            await self._lease_ended.wait()

    def count_idle_seconds(self) -> None:
        """Update the counter of seconds without any lease."""
        if self._idle_since is not None:
            now = time.monotonic()
            self._metrics.waiting.inc(now - self._idle_since)
            self._idle_since = now

    def _update_demand(self) -> None:
        """Tell the learner how many leases are wanted: none while draining, or while the engine or a tool is unavailable."""
        unavailable = any(monitor.unavailable for monitor in self._expander.availability_monitors)
        self._client.set_demand(0 if unavailable or self.draining.is_set() else self._full_demand)

    async def _run_lease(self, lease: Lease, control: LeaseControl) -> None:
        try:
            async with control.wait_scope():
                await self._weight_sync.wait_for_version(lease.min_version)
        except DeadlineError as error:
            self._metrics.errors.labels(type(error).__name__).inc()
            end = _unstarted(lease, str(error))
        except TimeoutError:
            end = _unstarted(lease, f"its sampler had to stop while it waited for policy version {lease.min_version}")
        else:
            end = await self._expander.expand_lease(lease, self._client.send_subtree, control)
        self._client.send_lease_end(end)

    def _forget_lease(self, lease: str) -> None:
        del self._leases[lease]
        self._metrics.leases.set(len(self._leases))
        if not self._leases:
            self._idle_since = time.monotonic()
        self._lease_ended.notify()


def _unstarted(lease: Lease, why: str) -> LeaseEnd:
    """The end of a lease on which nothing was done."""
    return LeaseEnd(lease.id, LeaseEndReason.RETURNED, lease.plan.leaves - lease.plan.trees, error=why)
