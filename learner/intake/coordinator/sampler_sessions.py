"""Sessions of samplers: with an open stream, disconnected a moment ago, or expired.

    stream opens ─► open session ─► stream breaks ─► waits for its sampler ─► expired: its leases are lost
                         │                                 │                      ▲
                         └── silent for too long ──────────┴── last will ─────────┘

A sampler that sends nothing for SILENCE_SECONDS is gone, in whatever state its connection is. Its MQTT last will says so
sooner, if its stream is closed or it has missed two heartbeats: a will alone may only mean that it lost the broker.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from learner.intake.coordinator.timings import CoordinatorTimings
from treegrpo.core.lease import LeaseEndReason
from treegrpo.v1.rollout_pb2 import RolloutResponse
from treegrpo.wire.control import Member

MAX_LAST_SEEN = 3


@dataclass(slots=True, eq=False)
class SamplerSession:
    """The open stream of one incarnation of a sampler."""

    id: str
    incarnation: int
    engine: str
    capacity: int
    max_queued: int
    """Messages that may wait to be written. A sampler that does not read its stream is disconnected before they are more."""
    demand: int = 0
    """Leases that it asks to hold at once."""
    outbox: asyncio.Queue[RolloutResponse | None] = field(default_factory=asyncio.Queue[RolloutResponse | None])
    """Messages to write; None ends the stream."""
    last_heard: float = field(default_factory=time.monotonic)
    """time.monotonic of its last message; infinite while the intake itself delays the next."""
    waiting_for: str = ""
    """What it is blocked on, from its heartbeat; empty while it makes progress."""
    waited_seconds: float = 0.0
    """How long, at its last heartbeat."""
    stream: asyncio.Timeout | None = None
    """Ends its stream when it is rescheduled."""
    disconnect_reason: str = ""
    """Why the learner ended the stream."""

    holder: str = field(init=False)
    """The key of its leases: name and incarnation, so that a restarted sampler is another holder."""

    def __post_init__(self) -> None:
        self.holder = f"{self.id}/{self.incarnation:016x}"

    def send_response(self, message: RolloutResponse) -> None:
        """Queue a message; disconnect the sampler if too many wait already."""
        if self.outbox.qsize() < self.max_queued:
            self.outbox.put_nowait(message)
        else:
            self.disconnect(f"Sampler {self.id} leaves {self.max_queued} messages unread; it has to join again.")

    def close_outbox(self) -> None:
        """Drop the queued messages; the one that is being written is the last."""
        while not self.outbox.empty():
            self.outbox.get_nowait()
        self.outbox.put_nowait(None)

    def disconnect(self, reason: str) -> None:
        """End its stream. It may open another."""
        self.disconnect_reason = self.disconnect_reason or reason
        if self.stream is not None:
            self.stream.reschedule(0.0)


class SamplerSessions:
    """All sessions: opens and closes them, and expires holders that are silent for too long."""

    def __init__(self, absent: set[str], expire: Callable[[str], None], timings: CoordinatorTimings | None = None) -> None:
        """``absent``: holders of leases from before the intake started; ``expire`` is called with each holder that is gone."""
        self.open_sessions: dict[str, SamplerSession] = {}
        """By sampler: the newest session of each."""
        self.empty_since = time.monotonic()
        """When (time.monotonic) the last of them closed."""
        self.last_seen: deque[str] = deque(maxlen=MAX_LAST_SEEN)
        """The names of the samplers that left last."""
        self._timings = timings or CoordinatorTimings()
        self._expire = expire
        self._interrupted = set(absent)
        """Holders that have not reconnected since the intake restarted."""
        self._disconnected = dict.fromkeys(absent, time.monotonic() + self._timings.silence_seconds)
        """Holders without a stream, and when (time.monotonic) they expire."""

    def open_session(self, session: SamplerSession) -> None:
        """A stream opened; an earlier one of the same sampler ends."""
        if (before := self.open_sessions.get(session.id)) is not None:
            before.disconnect(f"Sampler {session.id} has opened another stream.")
        self.open_sessions[session.id] = session
        self._disconnected.pop(session.holder, None)
        self._interrupted.discard(session.holder)

    def close_session(self, session: SamplerSession) -> bool:
        """A stream closed; False if its sampler has another, or has expired."""
        if self.open_sessions.get(session.id) is not session:
            return False
        self._remove(session)
        self._disconnected[session.holder] = min(session.last_heard, time.monotonic()) + self._timings.silence_seconds
        return True

    def expire_holder(self, holder: str) -> LeaseEndReason:
        """Forget a holder and end its stream; the reason with which its leases end."""
        self._disconnected.pop(holder, None)
        session = self.open_sessions.get(sampler_of(holder))
        if session is not None and session.holder == holder:
            self._remove(session)
            session.disconnect(f"Nothing came for {self._timings.silence_seconds:.0f} s; send heartbeats.")
        if holder not in self._interrupted:
            return LeaseEndReason.LOST
        self._interrupted.discard(holder)
        return LeaseEndReason.INTERRUPTED

    def _remove(self, session: SamplerSession) -> None:
        del self.open_sessions[session.id]
        self.empty_since = time.monotonic()
        self.last_seen.append(session.id)

    def apply_last_wills(self, members: Iterable[Member]) -> None:
        """Expire the holders whose last will the broker has published."""
        for member in [member for member in members if not member.alive]:
            holder, session = f"{member.id}/{member.incarnation:016x}", self.open_sessions.get(member.id)
            silent = session is not None and session.holder == holder and self._is_silent(session)
            if silent or holder in self._disconnected:
                self._expire(holder)

    def _is_silent(self, session: SamplerSession) -> bool:
        return time.monotonic() - session.last_heard > self._timings.will_grace_seconds

    async def expire_silent_forever(self) -> None:
        """Expire holders that are silent for too long. The time in which the intake itself stood still does not count."""
        interval, last = self._timings.silence_check_seconds, time.monotonic()
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            if (stalled := now - last - interval) > interval:
                for session in self.open_sessions.values():
                    session.last_heard += stalled
                self._disconnected = {holder: at + stalled for holder, at in self._disconnected.items()}
            last = now
            limit = now - self._timings.silence_seconds
            silent = [session.holder for session in self.open_sessions.values() if session.last_heard < limit]
            for holder in [*silent, *(holder for holder, at in self._disconnected.items() if at <= now)]:
                self._expire(holder)


def sampler_of(holder: str) -> str:
    """The name of the sampler in a holder's key."""
    return holder.rpartition("/")[0]
