"""Circuit breakers: samplers whose leases come to nothing are put aside for a while; when all are, the run is given up. Pure.

    closed ── FAILURES leases in a row without a leaf ──► open ── 1 s, then 2, 4 … 30 ──► half open ── a leaf ──► closed
                                                           ▲                                  │
                                                           └────── FAILURES more ─────────────┘

They are counted by sampler, over its incarnations: one bad machine puts itself aside and nobody else. A run is given up when no
sampler that is here, or was a moment ago, has brought a leaf, and each has failed through OPENINGS openings: 64 leases, and
1 + 2 + 4 seconds, at least. One sampler alone suffices if it is the only one; with several the others' leaves keep the run going.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from learner.intake.leases.rollout_group import OpenGroup
from learner.intake.leases.subtree_validation import TOO_LATE
from treegrpo.core.budget import Cost
from treegrpo.core.lease import SILENCE_SECONDS, LeaseEnd, LeaseEndReason
from treegrpo.errors import RunError

FAILURES = 16
"""Leases in a row that open a circuit, and leases of one trial."""
OPENINGS = 4
"""In a row, of every sampler, before the run is given up."""
FIRST_SECONDS, MOST_SECONDS = 1.0, 30.0
"""How long a circuit is open: at first, and at most."""
ABSENT_SECONDS = SILENCE_SECONDS
"""A sampler that left a shorter time ago may come back and do better; so may all when the intake began a shorter time ago."""
REPEATS = 8
"""Failures of a lone sampler at one question that do not count: with those that do they are fewer than FAILURES."""
SAID_LETTERS = 300
"""Of what a sampler says, in a sentence of ours."""
NAMED = 3
"""Samplers that the last sentence of a run quotes."""


class Verdict(Enum):
    """What a lease came to."""

    PROGRESS = "progress"
    """A leaf of its own."""
    FAILED = "failed"
    """It was worked on in vain, or failed."""
    IDLE = "idle"
    """It came back or was lost with nothing done, which says nothing of the task, but something of its sampler."""
    NEUTRAL = "neutral"
    """It was told to stop, or the learner itself was away."""

    @classmethod
    def of(cls, group: OpenGroup, end: LeaseEnd) -> Verdict:
        """Of the lease that ``end`` ends; ``group`` is as it was before."""
        if group.progressed:
            return cls.PROGRESS
        if not group.reasons <= set(TOO_LATE):  # it was told to stop for what it sent
            return cls.FAILED
        if group.closed or group.told_at is not None or end.reason is LeaseEndReason.INTERRUPTED:
            return cls.NEUTRAL
        if end.reason in (LeaseEndReason.RETURNED, LeaseEndReason.LOST):
            return cls.IDLE
        worked_on = end.reason is LeaseEndReason.FAILED or bool(group.subtrees) or end.unaccounted != Cost()
        return cls.FAILED if worked_on else cls.IDLE


@dataclass(slots=True)
class Circuit:
    """Of one sampler. Times are the clock's."""

    failures: int = 0
    """Since its last leaf, or since its last trial began."""
    openings: int = 0
    """Since its last leaf."""
    failed: int = 0
    """Leases since its last leaf that say something of the task."""
    retry_at: float = 0.0
    """When it may have leases again."""
    left_at: float | None = None
    """When its stream closed; None: it is here."""
    error: str = ""
    """What it said last of a lease that failed."""

    @property
    def hopeless(self) -> bool:
        """Whether it has failed for long enough."""
        return self.openings >= OPENINGS and self.failed >= OPENINGS * FAILURES


class NoProgressBreaker:
    """The circuits of all samplers, by name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._circuits: dict[str, Circuit] = {}

    def came(self, name: str) -> None:
        """A sampler has a stream. What it was put aside for, in any incarnation, it still is."""
        self._circuits.setdefault(name, Circuit()).left_at = None

    def left(self, name: str) -> None:
        """It has none any more. Who was never put aside is forgotten after a while."""
        if (circuit := self._circuits.get(name)) is not None and circuit.left_at is None:
            circuit.left_at = self._clock()
        gone = [name for name, one in self._circuits.items() if not one.openings and self._is_gone(one)]
        for other in gone:
            del self._circuits[other]

    def judge(self, name: str, verdict: Verdict, error: str = "") -> float:
        """A lease ended. Returns the seconds for which its sampler is put aside from now on, 0.0 if it is not."""
        circuit = self._circuits.setdefault(name, Circuit(left_at=self._clock()))
        if verdict is Verdict.PROGRESS:
            circuit.failures = circuit.openings = circuit.failed = 0
            circuit.retry_at, circuit.error = 0.0, ""
        if verdict in (Verdict.PROGRESS, Verdict.NEUTRAL):
            return 0.0
        circuit.failures += 1
        circuit.failed += verdict is Verdict.FAILED
        circuit.error = error or circuit.error
        if circuit.failures < FAILURES or self._is_open(circuit):
            return 0.0
        seconds = min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** min(circuit.openings, 10))
        circuit.failures, circuit.openings = 0, circuit.openings + 1
        circuit.retry_at = self._clock() + seconds
        return seconds

    def quota(self, name: str) -> int | None:
        """Leases that a sampler may hold: None while nothing is wrong, none while its circuit is open, few for a trial."""
        circuit = self._circuits.get(name)
        if circuit is None or not circuit.openings:
            return None
        return 0 if self._is_open(circuit) else FAILURES

    def put_aside(self, name: str) -> bool:
        """Whether a sampler's circuit is open, or half open."""
        return self.quota(name) is not None

    def aside(self) -> int:
        """How many samplers that are here are put aside."""
        return sum(bool(circuit.openings) and circuit.left_at is None for circuit in self._circuits.values())

    def said(self, name: str) -> str:
        """What a sampler said last, as its own words; empty if it said nothing."""
        circuit = self._circuits.get(name)
        words = " ".join(circuit.error.split()) if circuit else ""
        return f"sampler {name} says: “{words[:SAID_LETTERS]}”" if words else ""

    def hopeless(self, *, trained: bool) -> RunError | None:
        """The reason to give up the run, or None. Once it has ``trained``, rollout.max_context is no remedy: it must stay."""
        counted = {name: one for name, one in self._circuits.items() if not self._is_gone(one)}
        if not counted or (len(counted) == 1 and self._is_new) or not all(one.hopeless for one in counted.values()):
            return None
        leases = sum(one.failed for one in counted.values())
        said = [words for name in sorted(counted) if (words := self.said(name))]
        words = "; ".join(said[:NAMED]) or "none of them named an error"
        prompts = "" if trained else ", and do the prompts fit rollout.max_context"
        return RunError(
            f"The last {leases} leases, of {_samplers(counted)}, led to no finished episode; {words}. Does the retriever "
            f"answer{prompts}? The samplers' logs say more."
        )

    @property
    def _is_new(self) -> bool:
        """Whether samplers may not have come yet."""
        return self._clock() - self._began < ABSENT_SECONDS

    def _is_open(self, circuit: Circuit) -> bool:
        return bool(circuit.openings) and self._clock() < circuit.retry_at

    def _is_gone(self, circuit: Circuit) -> bool:
        return circuit.left_at is not None and self._clock() - circuit.left_at >= ABSENT_SECONDS


class Attempts:
    """Which samplers have failed at which question: where there are several, one alone does not set a question aside."""

    def __init__(self, breaker: NoProgressBreaker) -> None:
        self._breaker = breaker
        self._failed: dict[tuple[int, str], Counter[str]] = {}
        """By draw and question: how often each sampler has."""

    def excused(self, group: OpenGroup, name: str, here: Iterable[str]) -> bool:
        """Whether a lease that came to nothing does not count against its question.

        Its sampler is put aside, or has failed at it before, and another of those that are ``here`` has not. If no other is,
        one may still come: then up to REPEATS of its failures at one question do not count.
        """
        failed = self._failed.setdefault((group.draw, group.lease.question.id), Counter())
        others = set(here) - {name}
        untried = {other for other in others if not self._breaker.put_aside(other)} - failed.keys()
        others_may_do_better = bool(untried) if others else failed[name] <= REPEATS
        excused = others_may_do_better and (failed[name] > 0 or self._breaker.put_aside(name))
        failed[name] += 1
        return excused

    def forget(self, group: OpenGroup) -> None:
        """A question is done."""
        self._failed.pop((group.draw, group.lease.question.id), None)


def _samplers(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    return f"{'sampler' if len(shown) == 1 else 'samplers'} {', '.join(shown[:NAMED])}{more}"
