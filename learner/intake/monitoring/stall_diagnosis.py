"""What is waited for when nothing goes on: a moment of the run in, one cause and its sentence out. Pure.

The deepest cause comes first, since it explains those behind it:

    paused ─► disk ─► trainer that others wait for ─► no sampler ─► what samplers wait for ─► leases that are out ─► the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from treegrpo.core.lease import HEARTBEAT_SECONDS
from treegrpo.wire.control import RunState

NAMED = 3
"""Samplers that a sentence names; of more it says how many."""


class StalledPart(Enum):
    """The label of the metric: who or what is to move."""

    OPERATOR = "operator"
    DISK = "disk"
    TRAINER = "trainer"
    SAMPLERS = "samplers"
    """There is none."""
    TOOLS = "tools"
    """What samplers wait for themselves."""
    LEASES = "leases"
    """Work that is out."""
    DEMAND = "demand"
    """Samplers that are there and want nothing."""
    GROUPS = "groups"


@dataclass(frozen=True, slots=True)
class SamplerStatus:
    """A sampler with a stream. Times are seconds until now."""

    name: str
    silent: float = 0.0
    """Nothing has come from it; a heartbeat comes every HEARTBEAT_SECONDS."""
    demand: int = 0
    held: float | None = None
    """It has held its oldest lease for so long; None: it holds none."""
    waits_for: str = ""
    """In its own words."""
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainerStatus:
    """The trainer."""

    came: bool = False
    """It has asked since the intake started."""
    here: bool = False
    """It has a connection."""
    waits: bool = False
    """It has asked for groups or an evaluation, and waits."""
    since: float = 0.0
    """Seconds in this state."""
    step: int = 0
    """Of the newest version that it has published."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A moment of the run. Times are seconds until now."""

    state: RunState = RunState.RUNNING
    changed: float = 0.0
    """The run is in this state."""
    blocked: float | None = None
    """The disk refuses the journal; None: it takes it."""
    short: float | None = None
    """The disk has no room to spare, and nothing is granted."""
    folder: str = ""
    """Of the journal."""
    trainer: TrainerStatus = field(default_factory=TrainerStatus)
    workers: Sequence[SamplerStatus] = ()
    alone: float = 0.0
    """No sampler is there."""
    last_seen: Sequence[str] = ()
    """The samplers that left last."""
    out: int = 0
    """Leases."""
    room: bool = True
    """Leases could be granted."""
    ready: int = 0
    """Groups for the trainer."""
    batch: int = 1


@dataclass(frozen=True, slots=True)
class StallCause:
    """Who is to move. Causes are the same if part and names are, however long it takes."""

    part: StalledPart
    names: tuple[str, ...] = ()
    sentence: str = field(default="", compare=False)
    """As it follows "waiting for"."""


def diagnose_stall(scene: RunStatus) -> StallCause:
    """The deepest of what the run waits for."""
    if scene.state is RunState.PAUSED:
        return StallCause(StalledPart.OPERATOR, (), f"the operator: the run has been paused for {_time(scene.changed)}")
    if scene.blocked is not None:
        sentence = f"the disk, which has refused the journal {scene.folder} for {_time(scene.blocked)}; make room, or mend it"
        return StallCause(StalledPart.DISK, (), sentence)
    if scene.short is not None and not scene.out:
        sentence = f"the disk of {scene.folder}, which has had no room to spare for {_time(scene.short)}; make room"
        return StallCause(StalledPart.DISK, (), sentence)
    if (found := _trainer(scene)) is not None:
        return found
    if not scene.workers:
        seen = f"; the last to leave: {_names(scene.last_seen)}" if scene.last_seen else ""
        return StallCause(StalledPart.SAMPLERS, (), f"a sampler: none has been here for {_time(scene.alone)}{seen}")
    return _tools(scene) or _leases(scene) or _rest(scene)


def _trainer(scene: RunStatus) -> StallCause | None:
    """Nothing more can be rolled out before it moves, or it is not there at all."""
    trainer, since = scene.trainer, _time(scene.trainer.since)
    if not trainer.came:
        return StallCause(
            StalledPart.TRAINER, ("never",), f"the trainer, which has not come in the {since} since the intake started"
        )
    if not trainer.here:
        return StallCause(StalledPart.TRAINER, ("left",), f"the trainer, which left {since} ago, after step {trainer.step}")
    if trainer.waits or (scene.room and scene.ready < scene.batch) or scene.out:
        return None
    sentence = f"the trainer, which has not asked for {since}, at step {trainer.step}; {_ready(scene)}"
    return StallCause(StalledPart.TRAINER, ("works",), sentence)


def _tools(scene: RunStatus) -> StallCause | None:
    """What most of the samplers that wait for something wait for."""
    waiting = [worker for worker in scene.workers if worker.waits_for]
    if not waiting or len(waiting) < sum(worker.held is not None or worker.demand > 0 for worker in scene.workers):
        return None
    wants = [worker.waits_for for worker in waiting]
    what = max(wants, key=lambda want: (wants.count(want), want))
    those = [worker for worker in waiting if worker.waits_for == what]
    waited = _time(max(worker.waited for worker in those))
    return StallCause(StalledPart.TOOLS, (what,), f"{what}: so say {_names([w.name for w in those])}, for {waited}")


def _leases(scene: RunStatus) -> StallCause | None:
    """Work that is out, with the samplers that hold it; those of which nothing comes are named apart."""
    holders = sorted((worker for worker in scene.workers if worker.held is not None), key=lambda worker: -(worker.held or 0.0))
    if not holders:
        return None
    silent = [worker.name for worker in holders if worker.silent > 2 * HEARTBEAT_SECONDS]
    names = [worker.name for worker in holders]
    sentence = f"{scene.out} leases, out to {_names(names)}, the oldest for {_time(holders[0].held or 0.0)}"
    if silent:
        sentence += f"; nothing comes from {_names(silent)}"
    return StallCause(StalledPart.LEASES, tuple(sorted(names)), f"{sentence}; {_ready(scene)}")


def _rest(scene: RunStatus) -> StallCause:
    if scene.room:
        names = [worker.name for worker in scene.workers]
        return StallCause(StalledPart.DEMAND, tuple(sorted(names)), f"{_names(names)} to want a lease; {_ready(scene)}")
    return StallCause(StalledPart.GROUPS, (), f"groups: {_ready(scene)}, and nothing is out")


def _ready(scene: RunStatus) -> str:
    return f"{scene.ready} of {scene.batch} groups are ready"


def _names(names: Sequence[str]) -> str:
    """Some of them, and how many more."""
    shown = sorted(names)[:NAMED]
    more = len(names) - len(shown)
    if more:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def _time(seconds: float) -> str:
    """In words, roughly.

    Example:
        >>> _time(75), _time(3700)
        ('75 s', '62 min')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
