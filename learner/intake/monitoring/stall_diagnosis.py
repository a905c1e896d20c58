"""Diagnoses a stall: finds its cause in the state of the run. Pure.

The deepest cause comes first, since it explains those behind it:

    paused ─► disk ─► trainer that others wait for ─► no sampler ─► what samplers wait for ─► open leases ─► the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from treegrpo.core.lease import HEARTBEAT_SECONDS
from treegrpo.wire.control import RunState

MAX_NAMES = 3
"""Samplers that a sentence names; further ones are counted."""


class StalledPart(Enum):
    """The part of the system that the run waits for; a metric's label."""

    OPERATOR = "operator"
    DISK = "disk"
    TRAINER = "trainer"
    SAMPLERS = "samplers"
    """None is connected."""
    TOOLS = "tools"
    """Something outside that samplers wait for."""
    LEASES = "leases"
    """Samplers hold leases."""
    DEMAND = "demand"
    """Samplers are connected and ask for no lease."""
    GROUPS = "groups"


@dataclass(frozen=True, slots=True)
class SamplerStatus:
    """A sampler with an open stream. Times are seconds until now."""

    name: str
    silent_seconds: float = 0.0
    """Since its last message; a heartbeat comes every HEARTBEAT_SECONDS."""
    demand: int = 0
    lease_seconds: float | None = None
    """Since its oldest open lease was granted; None: it holds none."""
    waiting_for: str = ""
    """What it is blocked on, from its heartbeat."""
    waited_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainerStatus:
    has_connected: bool = False
    """At least once since the intake started."""
    is_connected: bool = False
    is_waiting: bool = False
    """It has asked for groups or an evaluation, and waits for the answer."""
    seconds: float = 0.0
    """In this state."""
    step: int = 0
    """Of the newest version that it has published."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state of the run at one moment. Times are seconds until now."""

    state: RunState = RunState.RUNNING
    state_seconds: float = 0.0
    """Since the run is in this state."""
    blocked_seconds: float | None = None
    """The disk refuses the journal for so long; None: it takes it."""
    low_space_seconds: float | None = None
    """The disk has no room to spare for so long, and nothing is granted."""
    journal_folder: str = ""
    trainer: TrainerStatus = field(default_factory=TrainerStatus)
    samplers: Sequence[SamplerStatus] = ()
    no_sampler_seconds: float = 0.0
    """Since the last sampler left."""
    last_seen: Sequence[str] = ()
    """The samplers that left last."""
    open_leases: int = 0
    can_grant: bool = True
    """There are leases to grant."""
    ready_groups: int = 0
    """Groups for the trainer."""
    batch: int = 1


@dataclass(frozen=True, slots=True)
class StallCause:
    """What the run waits for. Causes are equal if part and names are, however long the stall lasts."""

    part: StalledPart
    names: tuple[str, ...] = ()
    sentence: str = field(default="", compare=False)
    """As it follows "waiting for"."""


def diagnose_stall(status: RunStatus) -> StallCause:
    """The deepest cause of a stall."""
    if status.state is RunState.PAUSED:
        paused = _format_seconds(status.state_seconds)
        return StallCause(StalledPart.OPERATOR, (), f"the operator: the run has been paused for {paused}")
    if status.blocked_seconds is not None:
        blocked = f"has refused the journal {status.journal_folder} for {_format_seconds(status.blocked_seconds)}"
        return StallCause(StalledPart.DISK, (), f"the disk, which {blocked}; free space on it, or repair it")
    if status.low_space_seconds is not None and not status.open_leases:
        short = f"has had no room to spare for {_format_seconds(status.low_space_seconds)}"
        return StallCause(StalledPart.DISK, (), f"the disk of {status.journal_folder}, which {short}; free space on it")
    if (found := _trainer_cause(status)) is not None:
        return found
    if not status.samplers:
        seen = f"; the last to leave: {_join_names(status.last_seen)}" if status.last_seen else ""
        absent = _format_seconds(status.no_sampler_seconds)
        return StallCause(StalledPart.SAMPLERS, (), f"a sampler: none has been here for {absent}{seen}")
    return _tool_cause(status) or _lease_cause(status) or _other_cause(status)


def _trainer_cause(status: RunStatus) -> StallCause | None:
    """The trainer, if the staleness bound allows no lease before its next step, or it is not connected."""
    trainer, since = status.trainer, _format_seconds(status.trainer.seconds)
    if not trainer.has_connected:
        return StallCause(
            StalledPart.TRAINER, ("never",), f"the trainer, which has not come in the {since} since the intake started"
        )
    if not trainer.is_connected:
        return StallCause(StalledPart.TRAINER, ("left",), f"the trainer, which left {since} ago, after step {trainer.step}")
    if trainer.is_waiting or (status.can_grant and status.ready_groups < status.batch) or status.open_leases:
        return None
    sentence = f"the trainer, which has not asked for {since}, at step {trainer.step}; {_ready_groups(status)}"
    return StallCause(StalledPart.TRAINER, ("works",), sentence)


def _tool_cause(status: RunStatus) -> StallCause | None:
    """The tool or engine that most samplers wait for, if all samplers with leases wait."""
    waiting = [sampler for sampler in status.samplers if sampler.waiting_for]
    if not waiting or len(waiting) < sum(sampler.lease_seconds is not None or sampler.demand > 0 for sampler in status.samplers):
        return None
    reasons = [sampler.waiting_for for sampler in waiting]
    what = max(reasons, key=lambda reason: (reasons.count(reason), reason))
    those = [sampler for sampler in waiting if sampler.waiting_for == what]
    waited = _format_seconds(max(sampler.waited_seconds for sampler in those))
    return StallCause(StalledPart.TOOLS, (what,), f"{what}: so say {_join_names([w.name for w in those])}, for {waited}")


def _lease_cause(status: RunStatus) -> StallCause | None:
    """Open leases, with the samplers that hold them; silent ones are named apart."""
    holders = sorted(
        (sampler for sampler in status.samplers if sampler.lease_seconds is not None),
        key=lambda sampler: -(sampler.lease_seconds or 0.0),
    )
    if not holders:
        return None
    silent = [sampler.name for sampler in holders if sampler.silent_seconds > 2 * HEARTBEAT_SECONDS]
    names = [sampler.name for sampler in holders]
    oldest = _format_seconds(holders[0].lease_seconds or 0.0)
    sentence = f"{status.open_leases} leases, out to {_join_names(names)}, the oldest for {oldest}"
    if silent:
        sentence += f"; nothing comes from {_join_names(silent)}"
    return StallCause(StalledPart.LEASES, tuple(sorted(names)), f"{sentence}; {_ready_groups(status)}")


def _other_cause(status: RunStatus) -> StallCause:
    if status.can_grant:
        names = [sampler.name for sampler in status.samplers]
        return StallCause(
            StalledPart.DEMAND, tuple(sorted(names)), f"{_join_names(names)} to want a lease; {_ready_groups(status)}"
        )
    return StallCause(StalledPart.GROUPS, (), f"groups: {_ready_groups(status)}, and nothing is out")


def _ready_groups(status: RunStatus) -> str:
    return f"{status.ready_groups} of {status.batch} groups are ready"


def _join_names(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = sorted(names)[:MAX_NAMES]
    more = len(names) - len(shown)
    if more:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def _format_seconds(seconds: float) -> str:
    """A duration as text, rounded.

    Example:
        >>> _format_seconds(75), _format_seconds(3700)
        ('75 s', '62 min')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
