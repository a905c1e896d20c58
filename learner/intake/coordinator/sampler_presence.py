"""Who is there: samplers with a stream, those whose stream broke a moment ago, and those that are silent.

A sampler of which nothing is heard for SILENCE_SECONDS is gone, in whatever state its connection is. Its last will says so
sooner, if its stream is closed or it has missed a heartbeat or two: a will alone may only mean that it lost the broker.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable

from learner.intake.coordinator.sampler_sessions import SamplerSession
from treegrpo.core.lease import HEARTBEAT_SECONDS, SILENCE_SECONDS, LeaseEndReason
from treegrpo.wire.control import Member

WILL_GRACE_SECONDS = 2 * HEARTBEAT_SECONDS
"""Silent for so long, a last will is believed."""
SEEN = 3
TICK_SECONDS = 1.0
"""How often somebody looks who is silent."""


class SamplerSessions:
    def __init__(self, absent: set[str], lose: Callable[[str], None]) -> None:
        """``absent`` held leases when the intake was last there; ``lose`` is told the holder that is gone."""
        self.peers: dict[str, SamplerSession] = {}
        """By sampler: the newest stream of each."""
        self.alone_since = time.monotonic()
        """When (time.monotonic) the last of them left."""
        self.last_seen: deque[str] = deque(maxlen=SEEN)
        """The names of those that left last."""
        self._lose = lose
        self._interrupted = set(absent)
        """Those that have not come back to the intake since it was away itself."""
        self._departed = dict.fromkeys(absent, time.monotonic() + SILENCE_SECONDS)
        """Holders without a stream, and when (time.monotonic) they have been silent for too long."""

    def came(self, peer: SamplerSession) -> None:
        """A stream opened; an earlier one of the same sampler ends."""
        if (before := self.peers.get(peer.id)) is not None:
            before.hang_up(f"Sampler {peer.id} has opened another stream.")
        self.peers[peer.id] = peer
        self._departed.pop(peer.holder, None)
        self._interrupted.discard(peer.holder)

    def left(self, peer: SamplerSession) -> bool:
        """A stream closed; False if its sampler has another, or was gone before."""
        if self.peers.get(peer.id) is not peer:
            return False
        self._remove(peer)
        self._departed[peer.holder] = min(peer.heard, time.monotonic()) + SILENCE_SECONDS
        return True

    def gone(self, holder: str) -> LeaseEndReason:
        """A holder is not waited for any more, and its stream ends; why its leases do."""
        self._departed.pop(holder, None)
        peer = self.peers.get(sampler_of(holder))
        if peer is not None and peer.holder == holder:
            self._remove(peer)
            peer.hang_up(f"Nothing came for {SILENCE_SECONDS:.0f} s; send heartbeats.")
        if holder not in self._interrupted:
            return LeaseEndReason.LOST
        self._interrupted.discard(holder)
        return LeaseEndReason.INTERRUPTED

    def _remove(self, peer: SamplerSession) -> None:
        del self.peers[peer.id]
        self.alone_since = time.monotonic()
        self.last_seen.append(peer.id)

    def heed(self, members: Iterable[Member]) -> None:
        """Lose those whose last will came."""
        for member in [member for member in members if not member.alive]:
            holder, peer = f"{member.id}/{member.incarnation:016x}", self.peers.get(member.id)
            hushed = peer is not None and peer.holder == holder and time.monotonic() - peer.heard > WILL_GRACE_SECONDS
            if hushed or holder in self._departed:
                self._lose(holder)

    async def watch_over(self) -> None:
        """Lose who is silent for too long. While the intake itself stood still nobody was."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if (still := now - last - TICK_SECONDS) > TICK_SECONDS:
                for peer in self.peers.values():
                    peer.heard += still
                self._departed = {holder: at + still for holder, at in self._departed.items()}
            last = now
            silent = [peer.holder for peer in self.peers.values() if now - peer.heard > SILENCE_SECONDS]
            for holder in [*silent, *(holder for holder, at in self._departed.items() if at <= now)]:
                self._lose(holder)


def sampler_of(holder: str) -> str:
    """The name of a holder, without its incarnation."""
    return holder.rpartition("/")[0]
