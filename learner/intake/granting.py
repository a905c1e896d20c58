"""Who gets the next lease: of the samplers that want more than they hold the one that lacks most."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heapreplace

from learner.intake.clerk import Clerk
from learner.intake.leases import LeaseBook
from learner.intake.peers import Peer
from treegrpo.v1 import rollout_pb2 as pb


class Granting:
    def __init__(self, book: LeaseBook, clerk: Clerk, peers: Mapping[str, Peer]) -> None:
        """``peers``: the samplers that have a stream, by name."""
        self._book = book
        self._clerk = clerk
        self._peers = peers
        self._hungry: set[str] = set()
        """Those that may want more; with a thousand samplers nobody asks all of them at every end of a lease."""

    def look_at(self, name: str) -> None:
        """A sampler may want more than before: it said so, or a lease of its ended."""
        self._hungry.add(name)

    def grant(self) -> None:
        """Grant while there are both work within the bound and samplers that want it."""
        if not self._book.has_work:
            return
        line = [(-lacks, name) for name in self._hungry if (lacks := self._lacks(name)) > 0]
        heapify(line)
        self._hungry = {name for _, name in line}
        while line and (work := self._book.next_lease()) is not None:
            lacks, name = line[0]
            peer = self._peers[name]
            peer.send(pb.RolloutResponse(lease=self._clerk.grant(*work, peer.holder)))
            if lacks < -1:
                heapreplace(line, (lacks + 1, name))
            else:
                heappop(line)
                self._hungry.discard(name)

    def _lacks(self, name: str) -> int:
        """Leases that a sampler wants and does not hold."""
        peer = self._peers.get(name)
        return 0 if peer is None else peer.demand - self._book.open.held(peer.holder)
