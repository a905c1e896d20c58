"""Rollout groups: the state of one question from its first lease to the trainer. Pure.

    LEASED ─────► READY ─────► IN_TRAINING at a position ─► covered by two checkpoints: forgotten
     ▲  │
     │  ├───────► AWAITING_LEASE: has leaves; is leased again with the subtrees it has ─► LEASED or READY
     │  ├───────► REQUEUED: has none; its question is drawn again, by a new group
     └──┴───────► SET_ASIDE: given up

A group that closes at the staleness bound while its lease is out leaves a group without subtrees behind in the open leases,
which is SETTLING until the end of that lease reports its cost.
"""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass, field, replace
from enum import Enum
from typing import Any

from treegrpo.core.budget import Cost
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import Subtree
from treegrpo.core.tree import Group
from treegrpo.errors import ContractError, TreeError
from treegrpo.net.limits import MESSAGE_BYTES

log = logging.getLogger(__name__)
MAX_RELEASABLE_TOKENS = MESSAGE_BYTES // 32
"""Of a group that is leased again: with 8 bytes and more a token it has to fit into one message."""


class GroupState(Enum):
    """Where a group is between its lease and the trainer; `LEGAL_MOVES` has the transitions."""

    LEASED = "leased"
    """A lease is open and takes subtrees."""
    AWAITING_LEASE = "awaiting a lease"
    """It has leaves and will be leased again with the subtrees it has."""
    REQUEUED = "requeued"
    """It has no leaf and is dropped; its question will be leased again from the beginning."""
    READY = "ready"
    """Closed: ready for the trainer, or for the evaluation it belongs to."""
    IN_TRAINING = "in training"
    """It has a position in the trainer's order."""
    SET_ASIDE = "set aside"
    """Given up: it is neither trained nor leased again."""
    SETTLING = "settling"
    """What is left of a lease whose group was closed before: its cost is counted, its subtrees are rejected."""
    SETTLED = "settled"
    """The same after the end of that lease."""


LEGAL_MOVES: dict[GroupState, frozenset[GroupState]] = {
    GroupState.LEASED: frozenset(
        (GroupState.AWAITING_LEASE, GroupState.REQUEUED, GroupState.READY, GroupState.SET_ASIDE),
    ),
    GroupState.AWAITING_LEASE: frozenset((GroupState.LEASED, GroupState.READY)),
    GroupState.READY: frozenset((GroupState.IN_TRAINING, GroupState.SET_ASIDE)),
    GroupState.SETTLING: frozenset((GroupState.SETTLED,)),
    GroupState.REQUEUED: frozenset(),
    GroupState.IN_TRAINING: frozenset(),
    GroupState.SET_ASIDE: frozenset(),
    GroupState.SETTLED: frozenset(),
}


@dataclass(slots=True, eq=False)
class RolloutGroup:
    """The subtrees of one question, under its newest lease."""

    lease: Lease
    """The newest one."""
    draw: int
    """The number of its draw in the question queue; −1 for evaluation."""
    holder: str
    """The sampler of the newest lease, with its incarnation."""
    granted_at: float | None
    """time.monotonic of the grant; None when it is read from the journal."""
    attempts: int = 0
    """Leases without a result through a fault of their sampler or of the question."""
    min_policy_step: int = -1
    """The oldest policy step that any of its tokens may be from; by default that of its lease."""
    state: GroupState = GroupState.LEASED
    group: Group = field(init=False)
    subtrees: list[Subtree] = field(default_factory=list[Subtree])
    """In the order they were accepted; empty once the group has a position."""
    encoded: list[bytes] = field(default_factory=list[bytes])
    """Their messages, which the journal, the snapshots and the trainer get."""
    stop_requested_at: float | None = None
    """time.monotonic of the request to stop expanding."""
    inherited: int = 0
    """How many of the subtrees earlier leases have brought."""
    rejected: dict[tuple[int, int], Cost] = field(default_factory=dict[tuple[int, int], Cost])
    """Cost of the rejected subtrees by (tree, index)."""
    last_rejection: str = ""
    """Why the last of them was rejected, in a sentence."""
    rejection_reasons: set[str] = field(default_factory=set[str])
    """Why all of them were rejected, in a word each."""

    def __post_init__(self) -> None:
        self.group = Group(f"{self.draw:07d}" if self.draw >= 0 else self.lease.id, self.lease.question)
        self.min_policy_step = self.lease.min_version.step if self.min_policy_step < 0 else self.min_policy_step

    # ---- state

    def move_to(self, state: GroupState) -> None:
        """Change the state. Raises ContractError: `LEGAL_MOVES` has no such transition."""
        if state not in LEGAL_MOVES[self.state]:
            raise ContractError(f"Group {self.group.id} is {self.state.value}; it cannot become {state.value}.")
        self.state = state

    def lease_again(self, lease: Lease, holder: str, now: float | None) -> None:
        """Continue under another lease. Raises ContractError: the group does not await one."""
        self.move_to(GroupState.LEASED)
        self.lease, self.holder, self.granted_at = lease, holder, now
        self.min_policy_step = min(self.min_policy_step, lease.min_version.step)
        self.inherited = len(self.subtrees)
        self.stop_requested_at = None
        self.rejected, self.last_rejection, self.rejection_reasons = {}, "", set()

    def split_off_lease(self) -> RolloutGroup:
        """The group that stays in the open leases when this one closes before its lease ends: it settles the lease's cost."""
        rest = RolloutGroup(self.lease, self.draw, self.holder, self.granted_at, state=GroupState.SETTLING)
        rest.stop_requested_at, rest.rejected = self.stop_requested_at, self.rejected
        return rest

    @property
    def has_open_lease(self) -> bool:
        """Whether its newest lease has not ended."""
        return self.state in (GroupState.LEASED, GroupState.SETTLING)

    @property
    def is_done(self) -> bool:
        """Whether its question will not be leased again for it."""
        return self.state not in (GroupState.LEASED, GroupState.AWAITING_LEASE, GroupState.REQUEUED)

    # ---- subtrees

    def add_subtree(self, subtree: Subtree, encoded: bytes) -> bool:
        """Add a subtree and its message; False if it was there already. Raises TreeError."""
        fresh = self.group.append_subtree(subtree)
        if fresh:
            self.subtrees.append(subtree)
            self.encoded.append(encoded)
        return fresh

    def restore_subtree(self, subtree: Subtree, encoded: bytes) -> bool:
        """Add what was accepted before a restart; False if it was there already.

        One that is rejected by now stays in what the trainer gets: every group keeps its position, and the trainer, which
        examines all of them, leaves that one out.
        """
        try:
            return self.add_subtree(subtree, encoded)
        except TreeError as error:
            log.warning("the journal has a subtree that would be rejected today: %s", error)
        self.subtrees.append(subtree)
        self.encoded.append(encoded)
        return True

    def reject_subtree(self, key: tuple[int, int], cost: Cost, reason: str, why: str) -> bool:
        """Reject a subtree with ``reason``, a label, and ``why``, a sentence.

        False if it was rejected before, or more were than its plan has.
        """
        fresh = key not in self.rejected
        if fresh and len(self.rejected) >= self.lease.plan.leaves:
            return False
        self.rejected[key], self.last_rejection = cost, why
        self.rejection_reasons.add(reason)
        return fresh

    def drop_trees(self) -> None:
        """Keep only the messages that the trainer gets: the trees are not read any more."""
        self.group.trees.clear()
        self.subtrees.clear()

    @property
    def has_leaves(self) -> bool:
        """Whether any episode has a leaf."""
        return any(subtree.leaves for subtree in self.subtrees)

    @property
    def has_new_leaves(self) -> bool:
        """Whether its newest lease has added a leaf."""
        return any(subtree.leaves for subtree in self.subtrees[self.inherited :])

    @property
    def missing(self) -> int:
        """Chains and expansions of the plan that no sampler has sent."""
        return self.lease.plan.leaves - len({(subtree.tree, subtree.index) for subtree in self.subtrees})

    @property
    def forgone(self) -> int:
        """Expansions of the plan that no sampler has sent."""
        plan = self.lease.plan
        return plan.leaves - plan.trees - sum(subtree.index > 0 for subtree in self.subtrees)

    def can_be_leased_again(self, max_tokens: int = MAX_RELEASABLE_TOKENS) -> bool:
        """Whether another sampler can continue it: something is missing, and its ``max_tokens`` fit into a lease."""
        tokens = sum(len(subtree.prompt) + sum(step.length for step in subtree.steps) for subtree in self.subtrees)
        return self.missing > 0 and tokens <= max_tokens

    # ---- the end of its lease

    def counts_against_question(self, end: LeaseEnd) -> bool:
        """Whether a lease counts against its question: it was lost or failed, or was worked on and led to no leaf."""
        if end.reason in (LeaseEndReason.LOST, LeaseEndReason.FAILED):
            return True
        worked_on = bool(self.subtrees) or end.unaccounted != Cost()
        return not end.reason.unfinished and worked_on and not self.has_leaves

    def with_rejected_cost(self, end: LeaseEnd) -> LeaseEnd:
        """``end`` with the cost of rejected subtrees; a lease with rejected subtrees and no leaf has failed.

        One whose subtrees are rejected for their age alone has not: the trainer went back to a checkpoint, and its samplers
        with it.
        """
        end = replace(end, unaccounted=sum(self.rejected.values(), end.unaccounted))
        if not self.rejected or self.has_leaves or self.state is GroupState.SETTLING:
            return end
        reason = LeaseEndReason.RETURNED if self.rejection_reasons == {"age"} else LeaseEndReason.FAILED
        return replace(end, reason=reason, error=f"{len(self.rejected)} subtrees refused; the last: {self.last_rejection}")

    # ---- snapshots

    def snapshot_group(self) -> dict[str, Any]:
        """Plain data for `from_snapshot`, beside lease and subtrees."""
        return {
            "draw": self.draw,
            "holder": self.holder,
            "tries": self.attempts,
            "age": self.min_policy_step,
            "closed": self.state is GroupState.SETTLING,
            "refused": [[*key, *astuple(cost)] for key, cost in self.rejected.items()],
            "refusal": self.last_rejection,
            "reasons": sorted(self.rejection_reasons),
        }

    @classmethod
    def from_snapshot(cls, lease: Lease, row: dict[str, Any], state: GroupState) -> RolloutGroup:
        """The group of `snapshot_group`, without its subtrees."""
        state = GroupState.SETTLING if row["closed"] else state
        group = cls(lease, row["draw"], row["holder"], None, row["tries"], row["age"], state)
        group.rejected = {(tree, index): Cost(*cost) for tree, index, *cost in row["refused"]}
        group.last_rejection, group.rejection_reasons = row["refusal"], set(row["reasons"])
        return group
