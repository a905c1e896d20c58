"""Who gets the next lease: of the samplers that want more than they hold the one that holds fewest.

So one that wants very many leaves the others as many as it gets itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heapreplace

from learner.intake.coordinator.journaled_leases import Clerk
from learner.intake.coordinator.sampler_sessions import SamplerSession
from learner.intake.leases.lease_table import LeaseBook
from treegrpo.v1 import rollout_pb2 as pb


class Granting:
    def __init__(
        self, book: LeaseBook, clerk: Clerk, peers: Mapping[str, SamplerSession], quota: Callable[[str], int | None]
    ) -> None:
        """``peers``: the samplers that have a stream, by name; ``quota``: leases that one may hold, None if it says itself."""
        self._book = book
        self._clerk = clerk
        self._peers = peers
        self._quota = quota
        self._hungry: set[str] = set()
        """Those that may want more; with a thousand samplers nobody asks all of them at every end of a lease."""

    def look_at(self, name: str) -> None:
        """A sampler may want more than before: it said so, or a lease of its ended."""
        self._hungry.add(name)

    def grant(self) -> None:
        """Grant while there are both work within the bound and samplers that want it."""
        if not self._book.has_work:
            return
        line = [(self._held(name), name, lacks) for name in self._hungry if (lacks := self._lacks(name)) > 0]
        heapify(line)
        self._hungry = {name for _, name, _ in line}
        while line and (work := self._book.next_lease()) is not None:
            held, name, lacks = line[0]
            peer = self._peers[name]
            peer.send_response(pb.RolloutResponse(lease=self._clerk.grant(*work, peer.holder)))
            if lacks > 1:
                heapreplace(line, (held + 1, name, lacks - 1))
            else:
                heappop(line)
                self._hungry.discard(name)

    def _lacks(self, name: str) -> int:
        """Leases that a sampler wants and does not hold."""
        peer, quota = self._peers.get(name), self._quota(name)
        if peer is None:
            return 0
        return (peer.demand if quota is None else min(quota, peer.demand)) - self._held(name)

    def _held(self, name: str) -> int:
        return self._book.open.held(self._peers[name].holder) if name in self._peers else 0
