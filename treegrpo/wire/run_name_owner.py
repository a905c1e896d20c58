"""Ownership of run.name on a broker: one learner owns a name, another run with the same name is refused.

    candidate ─► hears all members' presence ──► no other learner ─────────────────────► owner
                                              └► another one ─► it answers ────────────► refused
                                                              └► its last will, silence ► owner

A learner says in its presence which run it works on (the id in run.json) and whether it owns the name. The broker passes
everything on in one order, so of two that come at once the second hears of the first before it hears itself. An owner
answers a candidate by saying its presence again. One that crashed cannot: its last will comes when the broker notices, after
1.5 keep-alives at the latest; a crashed learner of the same run is not waited for so long. A learner that lost the broker
is a candidate again when it is back.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import cast

import msgpack

from treegrpo.errors import RunError

KEEPALIVE_SECONDS = 10
ANSWER_SECONDS = 1.0
"""The longest that an owner takes to answer, unless it is gone."""
WILL_SECONDS = 2.0 * KEEPALIVE_SECONDS
"""A broker publishes the last will of a client that is silent after 1.5 keep-alives."""


@dataclass(frozen=True, slots=True)
class Member:
    """The presence of a process of the run."""

    id: str
    role: str
    """sampler or learner."""
    incarnation: int
    """Random, of this process."""
    metrics: str = ""
    """HOST:PORT of its /metrics."""
    run: str = ""
    """The id of the run that a learner works on; empty for others."""
    owner: bool = False
    """Whether a learner owns run.name."""
    alive: bool = True

    @property
    def client(self) -> str:
        """Its MQTT client id, unique among all runs of a broker."""
        return f"{self.id}@{self.incarnation:016x}"

    @property
    def topic(self) -> str:
        """The topic of its presence, below treegrpo/RUN/."""
        return f"members/{self.role}/{self.client}"

    def payload(self) -> bytes:
        return cast("bytes", msgpack.packb(asdict(self)))


class RunNameClaim:
    """A learner's claim to its run's name: from presences it follows how long to wait, and which learners to answer."""

    def __init__(self, member: Member, will_seconds: float = WILL_SECONDS) -> None:
        """``will_seconds``: how long to wait for the last will of another run's learner."""
        self.member = member
        """Our presence as it is now."""
        self.previous_owner: str | None = None
        """The id of the run that owned the name last, as the broker has retained it."""
        self._rivals: dict[str, Member] = {}
        """By topic, the learners that may be there."""
        self._will_seconds = will_seconds
        self._waiting_since = time.monotonic()
        self._refused_by: Member | None = None

    @property
    def is_owner(self) -> bool:
        return self.member.owner

    def begin_candidacy(self) -> None:
        """Become a candidate again after a new connection: no other member is known."""
        self.member = replace(self.member, owner=False)
        self.previous_owner = None
        self._rivals = {}
        self._refused_by = None

    def start_waiting(self) -> None:
        """Start the time in which others may answer: all retained presences are known."""
        self._waiting_since = time.monotonic()

    @property
    def has_rivals(self) -> bool:
        """Whether another learner may be there."""
        return bool(self._rivals)

    def note_member(self, other: Member, *, live: bool) -> bool:
        """Handle the presence of another member, ``live`` or retained; returns whether to publish ours again for it."""
        if other.role != self.member.role or other.topic == self.member.topic:
            return False
        if not other.alive:
            self._rivals.pop(other.topic, None)
        elif self.is_owner:
            return not other.owner
        else:
            self._rivals[other.topic] = other
            if live and other.owner:
                self._refused_by = other
        return False

    def remove_rival(self, topic: str) -> None:
        """The presence at ``topic`` is gone."""
        self._rivals.pop(topic, None)

    def wait_until(self) -> float:
        """When (time.monotonic) no owner can refuse the claim any more; now at the earliest."""
        if not self._rivals:
            return self._waiting_since
        ours = all(rival.run == self.member.run for rival in self._rivals.values())
        return self._waiting_since + (ANSWER_SECONDS if ours else self._will_seconds)

    def raise_if_refused(self, name: str, address: str) -> None:
        """Raise RunError if an owner has answered."""
        if (owner := self._refused_by) is None:
            return
        at = f", whose learner has its metrics at {owner.metrics}" if owner.metrics else ""
        raise RunError(
            f"run.name = {name} is taken at broker.address = {address} by the run {owner.run or 'without an id'}{at}; "
            "set run.name to another name, or stop that run."
        )

    def take_ownership(self) -> None:
        """Become the owner, until the connection to the broker is lost."""
        self.member = replace(self.member, owner=True)
        self._rivals = {}

    @property
    def retained_is_stale(self) -> bool:
        """Whether the broker's retained run state and version are another run's."""
        return self.previous_owner not in {None, self.member.run}
