"""The lease book: who rolls out what, within the staleness bound. Pure: no network, no clock, no disk.

Staleness bounds the number of training groups that are on their way:

    leases out + groups to be leased again + groups ready + groups in training ≤ (max_lag + 1) · batch

A group granted at version v meets at most that many groups minus itself, and the trainer takes the oldest first, so it
is trained at most max_lag versions later; it is closed with the leaves it has if others would push it beyond
(`staleness.py`).

A group whose lease is lost or fails is leased again with the subtrees it has, before anything new is begun. One
without a leaf begins again from nothing. After TRIES such leases it is closed with what it has, or set aside.

A trainer that went back to a checkpoint first takes its steps again. Until its policy is the one that a group was begun
with, nobody goes on with that group: tokens of an older policy could not be trained within the bound any more.

Every change is an event: granted, accepted, ended, closed, taken. The service writes each to the journal; after a
restart the journal's events go through the same methods.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from learner.intake.leases.rollout_group import TRIES, Fate, OpenGroup
from learner.intake.leases.staleness import pressing
from learner.intake.leases.standing import Standing
from learner.intake.leases.subtree_validation import check_asked_for, not_open
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason, LeaseKind, Plan
from treegrpo.core.question import Question
from treegrpo.core.step import PolicyVersion, Subtree
from treegrpo.errors import ContractError
from treegrpo.wire.codec import subtree_to_bytes


class LeaseBook(Standing):
    # ---- events: granted, accepted, ended

    def next_lease(self) -> tuple[Lease, int] | None:
        """The next lease to grant and its draw (-1: evaluation), or None when the bound or the work is exhausted.

        Nothing is changed: it stays the next one until it is `granted`.
        Evaluation goes first: it is short, and who waits for it waits for all of it. Then what was begun before.
        """
        if self.version is None or not self.has_work:
            return None
        if self._evaluation:
            question, _ = self._evaluation[0]
            return self._lease(LeaseKind.EVAL, question, self._plan.as_eval(), self.version), -1
        if movable := self.movable:
            group = min(movable, key=lambda waiting: (waiting.age, waiting.draw))
            draw = group.draw
            lease = self._lease(LeaseKind.TRAIN, group.lease.question, group.lease.plan, self.version, draw)
            return replace(lease, grant=lease.plan.remaining_budget(group.subtrees), accepted=tuple(group.subtrees)), draw
        draw = self._queue.next_draw
        return self._lease(LeaseKind.TRAIN, self._queue[draw], self._plan, self.version, draw), draw

    def _lease(self, kind: LeaseKind, question: Question, plan: Plan, version: PolicyVersion, draw: int = -1) -> Lease:
        seed = zlib.crc32(f"{self._seed}/{draw}/{question.id}".encode())
        return Lease(f"{kind.value}-{self._serial:07d}-{self._mark}", kind, question, plan, plan.grant, seed, version)

    def granted(self, lease: Lease, draw: int, holder: str, now: float | None) -> OpenGroup:
        """A lease goes out; it continues the group of its draw if there is one."""
        self._serial += 1
        if draw >= 0:
            self._queue.take(draw)
        group = OpenGroup(replace(lease, accepted=()), draw, holder, now)
        if (before := self.unfinished.pop(draw, None)) is not None:
            group.group, group.subtrees, group.encoded = before.group, before.subtrees, before.encoded
            group.tries, group.age = before.tries, min(before.age, group.age)
        elif lease.kind is LeaseKind.TRAIN:
            group.tries = self._tries.pop(draw, 0)
        elif self._evaluation and self._evaluation[0][0].id == lease.question.id:
            group.tries = self._evaluation.popleft()[1]
        group.inherited = len(group.subtrees)
        self.open[lease.id] = group
        self.ledger.grant(lease.id, lease.kind, lease.grant)
        return group

    def accept(self, subtree: Subtree, encoded: bytes = b"") -> bool:
        """Add a subtree to its group, and its message if that is at hand; False if it was there already.

        Raises:
            ContractError: the lease is not open, or its group is closed.
            TreeError: the subtree does not fit its tree, is not sound or beyond the staleness bound. In any case nothing
                is changed.
        """
        group = self.find(subtree.lease)
        if group is None:
            raise not_open(subtree.lease)
        if group.closed:
            raise ContractError(f"Lease {subtree.lease} reached the staleness bound; its group is closed.")
        check_asked_for(group, subtree, self._vocabulary)
        if not group.add(subtree, encoded or subtree_to_bytes(subtree)):
            return False
        self._charge(group, subtree)
        return True

    def refuse(self, lease: str, key: tuple[int, int], cost: Cost, reason: str, why: str) -> bool:
        """Leave a subtree of an open lease out; see `OpenGroup.refuse`. Raises ContractError: the lease is not open."""
        group = self.open.get(lease)
        if group is None:
            raise ContractError(f"Lease {lease} is not open; none of its subtrees is refused.")
        return group.refuse(key, cost, reason, why)

    def _charge(self, group: OpenGroup, subtree: Subtree) -> None:
        if subtree.lease in self.open:
            self.ledger.spend(subtree.lease, Budget.for_cost(subtree.cost))
        else:
            self.ledger.late(group.lease.kind, Budget.for_cost(subtree.cost))

    def ended(self, end: LeaseEnd, *, excused: bool = False) -> OpenGroup:
        """Close a lease; its `OpenGroup.fate` says what becomes of its group. ``excused``: no try is counted.

        Raises:
            ContractError: the lease is not open.
        """
        group = self.open.pop(end.lease, None)
        if group is None:
            raise ContractError(f"Lease {end.lease} is not open; it has ended before.")
        if end.reason.silent:
            self.ledger.forfeit(end.lease)
        else:
            self.ledger.spend(end.lease, Budget.for_cost(end.unaccounted))
            self.ledger.refund(end.lease)
        if group.closed:
            return group
        group.blamed = self.at_fault(group, end) and not excused
        group.tries += group.blamed
        finished = not end.reason.unfinished or not group.can_move or group.tries >= TRIES
        self._dispose(group, end.reason.value, finished=finished)
        return group

    def at_fault(self, group: OpenGroup, end: LeaseEnd) -> bool:
        """Whether a lease counts against its question: it was lost or failed, or was worked on and led to no leaf."""
        if end.reason in (LeaseEndReason.LOST, LeaseEndReason.FAILED):
            return True
        worked_on = bool(group.subtrees) or end.unaccounted != Cost()
        return not end.reason.unfinished and worked_on and not group.has_leaves

    def _dispose(self, group: OpenGroup, why: str, *, finished: bool) -> None:
        """Close a group that has leaves and is ``finished``; else have it tried again, unless it was tried enough."""
        group.fate = Fate.WAITING
        if group.has_leaves and finished:
            group.fate = Fate.CLOSED
        elif group.tries >= TRIES:
            group.fate = Fate.ASIDE
        if group.fate is Fate.WAITING:
            self._put_back(group)
        elif group.lease.kind is LeaseKind.EVAL:
            self.answers.add(group)
        elif group.fate is Fate.CLOSED:
            self.groups.close(group)
        else:
            self.set_aside[why] += 1

    def _put_back(self, group: OpenGroup) -> None:
        if group.lease.kind is LeaseKind.EVAL:
            if group.lease.min_version == self.version:  # else another evaluation has begun, which asks for itself
                self._evaluation.append((group.lease.question, group.tries))
        elif group.has_leaves:
            self.unfinished[group.draw] = group
        else:
            self._tries[group.draw] = group.tries
            self._queue.put_back(group.draw)

    def evaluate(self, version: PolicyVersion, questions: list[Question]) -> None:
        """Put ``version``'s evaluation leases in line but those that are out; what is in line of an earlier one is dropped."""
        leases = (group.lease for group in self.open.values())
        out = {lease.question.id for lease in leases if lease.kind is LeaseKind.EVAL and lease.min_version == version}
        self._evaluation = deque((question, 0) for question in questions if question.id not in out)

    # ---- events: closed, taken

    def pressing(self, count: int) -> list[OpenGroup]:
        """The groups that have to close before ``count`` ready ones may be trained, since there is no later step for them."""
        held = (group for group in self.open.values() if group.lease.kind is LeaseKind.TRAIN and not group.closed)
        begun = [group for group in (*held, *self.unfinished.values()) if group.age < self.base]  # a later step for the others
        begun.sort(key=lambda group: (group.age, group.draw))
        ages, ready = [group.age for group in begun], [group.age for group in self.groups.ready]
        return begun[: pressing(ages, ready, self.base, self.batch, count, self._max_lag)]

    def overdue(self) -> list[OpenGroup]:
        """The groups that a whole batch is waiting for: it is ready, and may not be trained before them."""
        if self.version is None or self.groups.ready_count < self.batch:
            return []
        return self.pressing(self.batch)

    def close(self, draw: int) -> OpenGroup:
        """Close a group at the staleness bound with the leaves it has; one that has none begins again from nothing.

        Its lease, if one is out, stays open until its cost is known. Raises ContractError: no such group is open.
        """
        group = self.unfinished.pop(draw, None)
        if group is None:
            group = next((g for g in self.open.values() if g.draw == draw >= 0 and not g.closed), None)
            if group is None:
                raise ContractError(f"Group {draw:07d} is not open; it cannot be closed.")
            left = OpenGroup(group.lease, draw, group.holder, group.granted_at, closed=True, told_at=group.told_at)
            left.refused, left.fate = group.refused, Fate.CLOSED
            self.open[group.lease.id] = left
        group.tries += not group.has_leaves
        self._dispose(group, "overdue", finished=True)
        return group

    def stale(self) -> list[int]:
        """Ready draws beyond the bound, which happens if ``max_lag`` or ``batch`` were lowered between two starts."""
        return [group.draw for group in self.groups.ready if self.base - group.age > self._max_lag]

    def taken(self, draws: Sequence[int], stale: Sequence[int]) -> list[OpenGroup]:
        """The trainer gets these ready groups, at the next positions, and never the stale ones, which are returned.

        Raises ContractError: one is not ready.
        """
        left_out = [self.groups.leave_out(draw) for draw in stale]
        for group in left_out:
            group.fate = Fate.ASIDE
            self.set_aside["stale"] += 1
        self.groups.line_up(draws)
        return left_out

    # ---- replay

    def replay_grant(self, lease: Lease, draw: int, holder: str = "") -> None:
        """A grant read from the journal."""
        self.granted(lease, draw, holder, now=None)

    def replay_accepted(self, subtree: Subtree, encoded: bytes) -> OpenGroup | None:
        """A subtree read from the journal; its group, or None if it was there already. Raises ContractError: nobody asked."""
        if (group := self.find(subtree.lease)) is None:
            raise ContractError(f"Lease {subtree.lease} is not open; nobody could have accepted its work.")
        if not group.restore(subtree, encoded):
            return None
        self._charge(group, subtree)
        return group
