"""The lease dispatcher: one task that grants leases, each to the sampler that wants more than it holds and holds fewest.

    demand, lease end, new version, evaluation, run state, disk ─► wake ─► enforces the staleness bound ─► grants leases

A sampler that wants very many leaves the others as many as it gets itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heapreplace

from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.coordinator.sampler_sessions import SamplerSession
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.staleness import StalenessBound
from treegrpo.v1 import rollout_pb2 as pb


class LeaseDispatcher:
    def __init__(
        self,
        table: LeaseTable,
        leases: JournaledLeases,
        staleness: StalenessBound,
        sessions: Mapping[str, SamplerSession],
        *,
        quota: Callable[[str], int | None],
        may_grant: Callable[[], bool],
    ) -> None:
        """Dispatch leases of ``table``.

        Args:
            table: says which lease is next.
            leases: grants it.
            staleness: enforces the bound before anything is granted.
            sessions: the samplers that have a stream, by name.
            quota: leases that a sampler may hold, None if it says itself.
            may_grant: whether leases may be granted now.
        """
        self._table = table
        self._leases = leases
        self._staleness = staleness
        self._sessions = sessions
        self._quota = quota
        self._may_grant = may_grant
        self._wake = asyncio.Event()
        self._candidates: set[str] = set()
        """Samplers that may want more; with a thousand of them not all are asked at every end of a lease."""

    def wake_dispatcher(self, sampler: str | None = None) -> None:
        """Dispatch soon: something has changed, or ``sampler`` may want more than before."""
        if sampler is not None:
            self._candidates.add(sampler)
        self._wake.set()

    async def dispatch_forever(self) -> None:
        """Dispatch whenever the task is woken and leases may be granted. An exception here ends the intake."""
        while True:
            self._wake.clear()
            if self._may_grant():
                self._staleness.enforce_bound()
                self.dispatch_leases()
            await self._wake.wait()

    def dispatch_leases(self) -> None:
        """Grant leases while there are work within the bound and samplers that want more."""
        if not self._table.has_grantable_work:
            return
        line = [(self._count_held(name), name, free) for name in self._candidates if (free := self._count_free(name)) > 0]
        heapify(line)
        self._candidates = {name for _, name, _ in line}
        while line and (work := self._table.next_lease()) is not None:
            held, name, free = line[0]
            session = self._sessions[name]
            session.send_response(pb.RolloutResponse(lease=self._leases.grant_lease(*work, session.holder)))
            if free > 1:
                heapreplace(line, (held + 1, name, free - 1))
            else:
                heappop(line)
                self._candidates.discard(name)

    def _count_free(self, name: str) -> int:
        """How many more leases a sampler wants than it holds."""
        session, quota = self._sessions.get(name), self._quota(name)
        if session is None:
            return 0
        return (session.demand if quota is None else min(quota, session.demand)) - self._count_held(name)

    def _count_held(self, name: str) -> int:
        return self._table.open_leases.count_held_by(self._sessions[name].holder) if name in self._sessions else 0
