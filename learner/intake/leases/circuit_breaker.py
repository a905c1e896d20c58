"""Circuit breakers: no leases for samplers whose leases fail; when all circuits stay open, the run ends. Pure.

    closed ── FAILURES leases in a row without a leaf ──► open ── 1 s, then 2, 4 … 30 ──► half open ── a leaf ──► closed
                                                           ▲                                  │
                                                           └────── FAILURES more ─────────────┘

They are counted by sampler, over its incarnations: one bad machine is put aside and no other. A run is given up when no
sampler that is connected, or was a moment ago, has brought a leaf, and each has failed through OPENINGS openings: 64 leases, and
1 + 2 + 4 seconds, at least. One sampler alone suffices if it is the only one; with several the others' leaves keep the run going.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from learner.intake.leases.subtree_validation import TOO_LATE_REASONS
from treegrpo.core.budget import Cost
from treegrpo.core.lease import SILENCE_SECONDS, LeaseEnd, LeaseEndReason
from treegrpo.errors import RunError
from treegrpo.timing.backoff import Backoff

FAILURES = 16
"""Leases in a row that open a circuit, and leases of one half-open trial."""
OPENINGS = 4
"""In a row, of every sampler, before the run is given up."""
MAX_ERROR_CHARACTERS = 300
"""Of a sampler's error, in an error or a log line."""
MAX_NAMES = 3
"""Samplers that the error which ends a run names."""


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """How long a circuit is open, and which failures count."""

    open_backoff: Backoff = Backoff.exponential(1.0, 30.0)
    """How long a circuit is open, by its openings in a row."""
    absent_seconds: float = SILENCE_SECONDS
    """A sampler that left a shorter time ago may come back and do better; so may all when the intake began a shorter time ago."""
    lone_repeats: int = 8
    """Failures of a lone sampler at one question that do not count: with those that do they are fewer than FAILURES."""


class LeaseOutcome(Enum):
    """The outcome of a lease, as the circuit breaker counts it."""

    PROGRESS = "progress"
    """A leaf of its own."""
    FAILED = "failed"
    """It was worked on without a leaf, or failed."""
    IDLE = "idle"
    """It was returned or lost without work: no sign of a bad task, but of a bad sampler."""
    NEUTRAL = "neutral"
    """Its sampler was asked to stop, or the learner restarted."""

    @classmethod
    def classify(cls, group: RolloutGroup, end: LeaseEnd) -> LeaseOutcome:
        """The outcome of the lease that ``end`` ends; ``group`` is as it was before."""
        if group.has_new_leaves:
            return cls.PROGRESS
        if not group.rejection_reasons <= set(TOO_LATE_REASONS):  # it was asked to stop for what it sent
            return cls.FAILED
        asked_to_stop = group.state is GroupState.SETTLING or group.stop_requested_at is not None
        if asked_to_stop or end.reason is LeaseEndReason.INTERRUPTED:
            return cls.NEUTRAL
        if end.reason in (LeaseEndReason.RETURNED, LeaseEndReason.LOST):
            return cls.IDLE
        worked_on = end.reason is LeaseEndReason.FAILED or bool(group.subtrees) or end.unaccounted != Cost()
        return cls.FAILED if worked_on else cls.IDLE


@dataclass(slots=True)
class SamplerCircuit:
    """The circuit of one sampler. Times are those of the clock."""

    failures: int = 0
    """Since its last leaf, or since its last trial began."""
    openings: int = 0
    """Since its last leaf."""
    failed: int = 0
    """Leases since its last leaf whose outcome is `LeaseOutcome.FAILED`."""
    retry_at: float = 0.0
    """When it may have leases again."""
    left_at: float | None = None
    """When its stream closed; None: it is connected."""
    error: str = ""
    """The last error it named."""

    @property
    def is_exhausted(self) -> bool:
        """Whether it has failed often enough in a row for the run to be given up."""
        return self.openings >= OPENINGS and self.failed >= OPENINGS * FAILURES


class NoProgressBreaker:
    """The circuits of all samplers, by name."""

    def __init__(self, limits: BreakerLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or BreakerLimits()
        self._clock = clock
        self._started_at = clock()
        self._circuits: dict[str, SamplerCircuit] = {}

    def sampler_joined(self, name: str) -> None:
        """Note that a sampler has a stream. If any incarnation of it was put aside, it still is."""
        self._circuits.setdefault(name, SamplerCircuit()).left_at = None

    def sampler_left(self, name: str) -> None:
        """Note that a sampler has no stream. One that was never put aside is forgotten after a while."""
        if (circuit := self._circuits.get(name)) is not None and circuit.left_at is None:
            circuit.left_at = self._clock()
        gone = [name for name, one in self._circuits.items() if not one.openings and self._is_gone(one)]
        for other in gone:
            del self._circuits[other]

    def record_outcome(self, name: str, outcome: LeaseOutcome, error: str = "") -> float:
        """Count the outcome of a lease. Returns the seconds for which its sampler is put aside from now on, 0.0 if it is not."""
        circuit = self._circuits.setdefault(name, SamplerCircuit(left_at=self._clock()))
        if outcome is LeaseOutcome.PROGRESS:
            circuit.failures = circuit.openings = circuit.failed = 0
            circuit.retry_at, circuit.error = 0.0, ""
        if outcome in (LeaseOutcome.PROGRESS, LeaseOutcome.NEUTRAL):
            return 0.0
        circuit.failures += 1
        circuit.failed += outcome is LeaseOutcome.FAILED
        circuit.error = error or circuit.error
        if circuit.failures < FAILURES or self._is_open(circuit):
            return 0.0
        seconds = self.limits.open_backoff.delay(circuit.openings)
        circuit.failures, circuit.openings = 0, circuit.openings + 1
        circuit.retry_at = self._clock() + seconds
        return seconds

    def lease_quota(self, name: str) -> int | None:
        """Leases that a sampler may hold: None while nothing is wrong, none while its circuit is open, few for a trial."""
        circuit = self._circuits.get(name)
        if circuit is None or not circuit.openings:
            return None
        return 0 if self._is_open(circuit) else FAILURES

    def is_put_aside(self, name: str) -> bool:
        """Whether a sampler's circuit is open, or half open."""
        return self.lease_quota(name) is not None

    def count_put_aside(self) -> int:
        """How many connected samplers are put aside."""
        return sum(bool(circuit.openings) and circuit.left_at is None for circuit in self._circuits.values())

    def quote_last_error(self, name: str) -> str:
        """The last error of a sampler, as a quotation; empty if it sent none."""
        circuit = self._circuits.get(name)
        words = " ".join(circuit.error.split()) if circuit else ""
        return f"sampler {name} says: “{words[:MAX_ERROR_CHARACTERS]}”" if words else ""

    def reason_to_give_up(self, *, trained: bool) -> RunError | None:
        """The error that ends a run without progress, or None.

        Once it has ``trained``, rollout.max_context is no remedy: it must stay.
        """
        counted = {name: one for name, one in self._circuits.items() if not self._is_gone(one)}
        if not counted or (len(counted) == 1 and self._is_new) or not all(one.is_exhausted for one in counted.values()):
            return None
        leases = sum(one.failed for one in counted.values())
        said = [words for name in sorted(counted) if (words := self.quote_last_error(name))]
        words = "; ".join(said[:MAX_NAMES]) or "none of them named an error"
        prompts = "" if trained else ", and do the prompts fit rollout.max_context"
        return RunError(
            f"The last {leases} leases, of {_list_samplers(counted)}, finished no episode; {words}. Does the retriever "
            f"answer{prompts}? The samplers' logs say more."
        )

    @property
    def _is_new(self) -> bool:
        """Whether the run is so young that samplers may not have connected yet."""
        return self._clock() - self._started_at < self.limits.absent_seconds

    def _is_open(self, circuit: SamplerCircuit) -> bool:
        return bool(circuit.openings) and self._clock() < circuit.retry_at

    def _is_gone(self, circuit: SamplerCircuit) -> bool:
        return circuit.left_at is not None and self._clock() - circuit.left_at >= self.limits.absent_seconds


def _list_samplers(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - MAX_NAMES} more" if len(shown) > MAX_NAMES else ""
    return f"{'sampler' if len(shown) == 1 else 'samplers'} {', '.join(shown[:MAX_NAMES])}{more}"
