"""Groups: open while their lease runs, then ready, then in line for the trainer. Pure.

    open ─► ready ─► in line at a position ─► trained ─► covered by two checkpoints: forgotten
     ▲ ▼
    waiting for another lease, with the subtrees it has

Which ready groups get the next *positions* is decided when the trainer asks (`staleness.py`), and kept: a trainer that
starts again gets the same groups at the same positions. A group is kept until two checkpoints cover it, for a trainer
that has to start from the checkpoint before its newest.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from enum import Enum
from itertools import islice
from typing import Any

from treegrpo.core.budget import Cost
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import Subtree
from treegrpo.core.tree import Group
from treegrpo.errors import ContractError, TreeError
from treegrpo.net.limits import MESSAGE_BYTES

log = logging.getLogger(__name__)


TRIES = 3
"""Leases of one draw that may be lost or fail: one may meet a bad machine, a second bad luck; then it is the question."""


MOVABLE_TOKENS = MESSAGE_BYTES // 32
"""Of a group that is leased again: with 8 bytes and more a token it has to fit into one message."""


class Fate(Enum):
    """What has become of a group."""

    OPEN = "open"
    WAITING = "waiting"
    """It will be leased again, with what it has or from the beginning."""
    CLOSED = "closed"
    """It is ready for the trainer, or for the evaluation it belongs to."""
    ASIDE = "aside"
    """Nothing came of it, and it is not tried again."""


@dataclass(slots=True, eq=False)
class OpenGroup:
    """A question being rolled out under a lease, or what a lease has left of it."""

    lease: Lease
    """The last one."""
    draw: int
    """The number of its draw in the question queue; −1 for evaluation."""
    holder: str
    """The sampler, with its incarnation."""
    granted_at: float | None
    """time.monotonic of the grant; None when it is read from the journal."""
    tries: int = 0
    """Leases that came to nothing through a fault of their sampler or of the question."""
    blamed: bool = False
    """Whether the last lease is one of them."""
    age: int = -1
    """The oldest policy step that any of its tokens may be from; by default that of its lease."""
    closed: bool = False
    """Its group was closed before its lease ended: what still comes is accounted for, but no longer wanted."""
    group: Group = field(init=False)
    subtrees: list[Subtree] = field(default_factory=list[Subtree])
    """In the order they were accepted; empty once the group has a position."""
    encoded: list[bytes] = field(default_factory=list[bytes])
    """Their messages, which the journal, the snapshots and the trainer get."""
    told_at: float | None = None
    """time.monotonic of the word to stop expanding."""
    inherited: int = 0
    """How many of the subtrees earlier leases have brought."""
    refused: dict[tuple[int, int], Cost] = field(default_factory=dict[tuple[int, int], Cost])
    """By (tree, index): what subtrees cost that are no part of the group."""
    refusal: str = ""
    """Why the last of them is none."""
    reasons: set[str] = field(default_factory=set[str])
    """Why all of them are none, in a word each."""
    fate: Fate = Fate.OPEN

    def __post_init__(self) -> None:
        self.group = Group(f"{self.draw:07d}" if self.draw >= 0 else self.lease.id, self.lease.question)
        self.age = self.lease.min_version.step if self.age < 0 else self.age

    @classmethod
    def of(cls, lease: Lease, state: dict[str, Any]) -> OpenGroup:
        """The group that `state` was taken of, without its subtrees."""
        group = cls(lease, state["draw"], state["holder"], None, state["tries"], age=state["age"], closed=state["closed"])
        group.refused = {(tree, index): Cost(*cost) for tree, index, *cost in state["refused"]}
        group.refusal, group.reasons = state["refusal"], set(state["reasons"])
        return group

    def state(self) -> dict[str, Any]:
        """Plain data to be restored from, beside lease and subtrees."""
        refused = [[*key, *astuple(cost)] for key, cost in self.refused.items()]
        more = {"refused": refused, "refusal": self.refusal, "reasons": sorted(self.reasons)}
        return {"draw": self.draw, "holder": self.holder, "tries": self.tries, "age": self.age, "closed": self.closed, **more}

    def add(self, subtree: Subtree, encoded: bytes) -> bool:
        """Accept a subtree; False if it was there already. Raises ContractError."""
        fresh = self.group.add(subtree)
        if fresh:
            self.subtrees.append(subtree)
            self.encoded.append(encoded)
        return fresh

    def restore(self, subtree: Subtree, encoded: bytes) -> bool:
        """Add what was accepted before a restart; False if it was there already.

        One that is refused by now stays in what the trainer gets: every group keeps its position, and the trainer, which
        examines all of them, leaves that one out.
        """
        try:
            return self.add(subtree, encoded)
        except TreeError as error:
            log.warning("the journal has what would be refused today: %s", error)
        self.subtrees.append(subtree)
        self.encoded.append(encoded)
        return True

    def rest(self) -> None:
        """Keep only what the trainer gets: nobody looks into the trees any more."""
        self.group.trees.clear()
        self.subtrees.clear()

    def refuse(self, key: tuple[int, int], cost: Cost, reason: str, why: str) -> bool:
        """Leave a subtree out for ``reason``, a word, and ``why``, a sentence.

        False if it was refused before, or more were than its plan has.
        """
        fresh = key not in self.refused
        if fresh and len(self.refused) >= self.lease.plan.leaves:
            return False
        self.refused[key], self.refusal = cost, why
        self.reasons.add(reason)
        return fresh

    @property
    def has_leaves(self) -> bool:
        """Whether any episode came to its end."""
        return any(subtree.leaves for subtree in self.subtrees)

    @property
    def progressed(self) -> bool:
        """Whether its last lease has brought any."""
        return any(subtree.leaves for subtree in self.subtrees[self.inherited :])

    @property
    def missing(self) -> int:
        """Chains and expansions that the plan asks for and nobody has sent."""
        return self.lease.plan.leaves - len({(subtree.tree, subtree.index) for subtree in self.subtrees})

    @property
    def can_move(self) -> bool:
        """Whether another sampler can go on with it: something is missing, and what is there fits into a lease."""
        tokens = sum(len(subtree.prompt) + sum(step.length for step in subtree.steps) for subtree in self.subtrees)
        return self.missing > 0 and tokens <= MOVABLE_TOKENS

    @property
    def forgone(self) -> int:
        """Expansions that the plan asks for and nobody has sent."""
        plan = self.lease.plan
        return plan.leaves - plan.trees - sum(subtree.index > 0 for subtree in self.subtrees)

    @property
    def given_up(self) -> bool:
        """It was tried often enough, or too late."""
        return self.fate is Fate.ASIDE or (self.fate is Fate.CLOSED and self.tries >= TRIES)

    def settle(self, end: LeaseEnd) -> LeaseEnd:
        """``end`` with what refused subtrees cost; a lease of which nothing else came has failed.

        One that is refused for its age alone has not: the trainer went back to a checkpoint, and its samplers with it.
        """
        end = replace(end, unaccounted=sum(self.refused.values(), end.unaccounted))
        if not self.refused or self.has_leaves or self.closed:
            return end
        reason = LeaseEndReason.RETURNED if self.reasons == {"age"} else LeaseEndReason.FAILED
        return replace(end, reason=reason, error=f"{len(self.refused)} subtrees refused, the last so: {self.refusal}")


class GroupQueue:
    """Closed training groups, from the trainer's last checkpoint but one on."""

    def __init__(self) -> None:
        self._line: deque[OpenGroup] = deque()
        """Those with a position, from `_kept` on."""
        self._ready: dict[int, OpenGroup] = {}
        """Those without, by draw."""
        self._ages: list[tuple[int, int]] = []
        """Their ages and draws, ascending."""
        self._kept = 0
        self._covered = 0
        self._trained = 0

    @property
    def line_end(self) -> int:
        """The next position to be given."""
        return self._kept + len(self._line)

    @property
    def closed(self) -> int:
        """Training groups closed since the run began."""
        return self.line_end + len(self._ready)

    @property
    def waiting(self) -> int:
        """Groups that are ready or in training."""
        return self.closed - self._trained

    @property
    def in_training(self) -> int:
        """Groups that have a position and are not trained yet."""
        return self.line_end - self._trained

    @property
    def ready(self) -> list[OpenGroup]:
        """Those without a position, oldest policy first."""
        return [self._ready[draw] for _, draw in self._ages]

    @property
    def ready_count(self) -> int:
        """How many those are."""
        return len(self._ready)

    def close(self, group: OpenGroup) -> None:
        self._ready[group.draw] = group
        insort(self._ages, (group.age, group.draw))

    def line_up(self, draws: Sequence[int]) -> None:
        """Give the next positions to these ready groups. Raises ContractError at one that is not ready."""
        for draw in draws:
            group = self.leave_out(draw)
            group.rest()
            self._line.append(group)

    def leave_out(self, draw: int) -> OpenGroup:
        """Take a ready group away. Raises ContractError if it is not ready."""
        if draw not in self._ready:
            raise ContractError(f"Group {draw:07d} is not ready; it cannot be given to the trainer.")
        group = self._ready.pop(draw)
        del self._ages[bisect_left(self._ages, (group.age, draw))]
        return group

    def take(self, position: int, count: int) -> list[OpenGroup]:
        """The groups at ``position`` and after it, up to ``count`` of them; fewer until more are given a position.

        Raises:
            ContractError: they were forgotten, because two checkpoints said they would not be asked for again; or the
                trainer is ahead of the journal, a part of which must be missing.
        """
        if position < self._kept:
            raise ContractError(
                f"Position {position} is gone: a checkpoint covers everything before {self._kept}. Resume from that."
            )
        if position > self.line_end:
            raise ContractError(
                f"The trainer is at position {position}, but the journal ends at {self.line_end}: its newest part is missing. "
                "Restore it, or begin a new run from the last checkpoint (model.path)."
            )
        self._trained = position
        first = position - self._kept
        return list(islice(self._line, first, first + count))

    def trained(self, position: int) -> None:
        """A step has trained everything before ``position``; a trainer that crashes may still ask for it again."""
        self._trained = position

    def covered(self, position: int) -> None:
        """A checkpoint covers everything before ``position``: what the one before it covered is forgotten.

        A trainer that went back says a smaller position than before, and needs everything from there on.
        """
        while self._kept < self._covered < position and self._line:
            self._line.popleft()
            self._kept += 1
        self._covered = position

    def kept(self) -> list[OpenGroup]:
        """The closed groups that may be asked for: those with a position in its order, then those that are ready."""
        return [*self._line, *self._ready.values()]

    def state(self) -> dict[str, Any]:
        """Plain data to be restored from, together with `kept`."""
        return {"kept": self._kept, "covered": self._covered, "in_line": len(self._line)}

    def restore(self, state: dict[str, Any], groups: list[OpenGroup]) -> None:
        """Become what `state` and `kept` were taken of. What is in training the trainer says when it is back."""
        self._kept, self._covered = state["kept"], state["covered"]
        self._line = deque(groups[: state["in_line"]])
        for group in self._line:
            group.rest()
        for group in groups[state["in_line"] :]:
            self.close(group)
