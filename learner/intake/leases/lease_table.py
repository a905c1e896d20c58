"""The lease table: which sampler rolls out which question, within the staleness bound. Pure: no network, no clock, no disk.

Staleness bounds the number of training groups that are on their way:

    open leases + groups to be leased again + groups ready + groups in training ≤ (max_lag + 1) · batch

A group granted at version v meets at most that many groups minus itself, and the trainer takes the oldest first, so it
is trained at most max_lag versions later; it is closed with the leaves it has if others would push it beyond
(`staleness.py`).

A group whose lease is lost or fails is leased again with the subtrees it has, before anything new is begun. One
without a leaf begins again from nothing. After MAX_ATTEMPTS such leases it is closed with what it has, or set aside.

A trainer that went back to a checkpoint first takes its steps again. Until its policy is the one that a group was begun
with, no sampler continues that group: tokens of an older policy could not be trained within the bound any more.

Every change is an event: granted, accepted, ended, closed, positions assigned. The service writes each to the journal;
after a restart the journal's events go through the same methods.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learner.intake.leases.budget_ledger import Ledger
from learner.intake.leases.evaluation import EvaluationAnswers
from learner.intake.leases.open_leases import OpenLeaseIndex
from learner.intake.leases.question_give_up import used_all_attempts
from learner.intake.leases.question_queue import QuestionQueue
from learner.intake.leases.rollout_group import MAX_RELEASABLE_TOKENS, GroupState, RolloutGroup
from learner.intake.leases.subtree_validation import check_subtree, lease_not_open
from learner.intake.leases.train_queue import TrainQueue
from treegrpo.core.budget import Budget
from treegrpo.core.lease import Lease, LeaseEnd, LeaseKind, Plan
from treegrpo.core.question import Question
from treegrpo.core.step import PolicyVersion, Subtree
from treegrpo.errors import ContractError
from treegrpo.wire.codec import subtree_to_bytes


class LeaseTable:
    def __init__(
        self,
        queue: QuestionQueue,
        plan: Plan,
        *,
        seed: int,
        batch: int,
        max_lag: int,
        total: int,
        vocabulary: int,
        mark: str,
        max_releasable_tokens: int = MAX_RELEASABLE_TOKENS,
    ) -> None:
        """Begin without leases.

        Args:
            queue: the training questions.
            plan: of a training lease.
            seed: of the run.
            batch: groups of a step.
            max_lag: the staleness bound, in versions.
            total: training groups of the whole run; no more are leased than it still needs.
            vocabulary: token ids of the model.
            mark: of this process, in every lease id: a lease that a crash kept out of the journal never shares its id.
            max_releasable_tokens: of a group that is leased again.
        """
        self._question_queue = queue
        self._plan = plan
        self._seed = seed
        self.batch = batch
        self.max_lag = max_lag
        self._total = total
        self._vocabulary = vocabulary
        self._mark = mark
        self._max_releasable_tokens = max_releasable_tokens
        self._evaluation_queue: deque[tuple[Question, int]] = deque()
        """What is to be evaluated, with the attempts it took so far."""
        self._serial = 0
        self._requeued_attempts: dict[int, int] = {}
        """Attempts of draws that were requeued."""
        self.open_leases = OpenLeaseIndex()
        self.unfinished_groups: dict[int, RolloutGroup] = {}
        """Training groups with leaves that await another lease, by draw."""
        self.set_aside_counts: Counter[str] = Counter()
        """Training draws that were set aside, by reason."""
        self.train_queue = TrainQueue()
        self.ledger = Ledger()
        self.evaluation_answers = EvaluationAnswers()
        self.version: PolicyVersion | None = None

    # ---- limits and look-ups

    def count_active_leases(self, kind: LeaseKind) -> int:
        """Open leases of a kind whose group is not closed yet."""
        return self.open_leases.count_active(kind)

    @property
    def max_groups_in_flight(self) -> int:
        """The most training groups that may be in flight."""
        return (self.max_lag + 1) * self.batch

    @property
    def lease_limit(self) -> int:
        """Training leases that may be open now, by the staleness bound and by what the run still needs."""
        in_flight, closed = self.train_queue.untrained_count, self.train_queue.closed_count
        return max(0, min(self.max_groups_in_flight - in_flight, self._total - closed))

    @property
    def has_grantable_work(self) -> bool:
        """Whether there is anything to lease, and capacity for it."""
        if self.version is None:
            return False
        capacity = self.lease_limit - self.count_active_leases(LeaseKind.TRAIN) - len(self.unfinished_groups)
        return bool(self._evaluation_queue) or capacity > 0 or bool(self.resumable_groups)

    @property
    def resumable_groups(self) -> list[RolloutGroup]:
        """The unfinished groups that another sampler can continue: the policy is as new as the one they were begun with."""
        step = self.version.step if self.version else -1
        return [group for group in self.unfinished_groups.values() if group.min_policy_step <= step]

    @property
    def base_policy_step(self) -> int:
        """The policy step from which the next groups are trained."""
        return (self.version.step if self.version else 0) + self.train_queue.in_training_count // self.batch

    def find_group(self, lease: str) -> RolloutGroup | None:
        """The group that still takes subtrees of a lease: it is open, or was lost and no sampler has continued it yet.

        Once another sampler continues, it makes nodes of the same ids as those that the lost lease may still bring.
        """
        unfinished = (group for group in self.unfinished_groups.values() if group.lease.id == lease)
        return self.open_leases.get(lease) or next(unfinished, None)

    def require_open_lease(self, lease: str) -> RolloutGroup:
        """The group of an open lease. Raises ContractError: it is not open."""
        group = self.open_leases.get(lease)
        if group is None:
            raise ContractError(f"Lease {lease} is not open; it has ended before.")
        return group

    # ---- the trainer's progress

    def set_policy_version(self, version: PolicyVersion, position: int) -> None:
        """Lease with ``version`` from now on; the groups before ``position`` made it."""
        self.version = version
        self.train_queue.mark_trained(position)

    def forget_covered(self, position: int) -> None:
        """A checkpoint covers the groups before ``position``."""
        self.train_queue.mark_covered(position)

    # ---- events: granted, accepted, ended

    def next_lease(self) -> tuple[Lease, int] | None:
        """The next lease to grant and its draw (-1: evaluation), or None when the bound or the work is exhausted.

        Nothing is changed: it stays the next one until `grant_lease`.
        Evaluation goes first: it is short, and the trainer waits for all of it. Then what was begun before.
        """
        if self.version is None or not self.has_grantable_work:
            return None
        if self._evaluation_queue:
            question, _ = self._evaluation_queue[0]
            return self._make_lease(LeaseKind.EVAL, question, self._plan.as_eval(), self.version), -1
        if resumable := self.resumable_groups:
            group = min(resumable, key=lambda waiting: (waiting.min_policy_step, waiting.draw))
            draw = group.draw
            lease = self._make_lease(LeaseKind.TRAIN, group.lease.question, group.lease.plan, self.version, draw)
            return replace(lease, grant=lease.plan.remaining_budget(group.subtrees), accepted=tuple(group.subtrees)), draw
        draw = self._question_queue.next_draw
        return self._make_lease(LeaseKind.TRAIN, self._question_queue[draw], self._plan, self.version, draw), draw

    def _make_lease(self, kind: LeaseKind, question: Question, plan: Plan, version: PolicyVersion, draw: int = -1) -> Lease:
        seed = zlib.crc32(f"{self._seed}/{draw}/{question.id}".encode())
        return Lease(f"{kind.value}-{self._serial:07d}-{self._mark}", kind, question, plan, plan.grant, seed, version)

    def grant_lease(self, lease: Lease, draw: int, holder: str, now: float | None) -> RolloutGroup:
        """Open a lease; it continues the group of its draw if there is one. ``now``: None when it is read from the journal."""
        self._serial += 1
        if draw >= 0:
            self._question_queue.mark_drawn(draw)
        bare = replace(lease, accepted=())
        if (group := self.unfinished_groups.pop(draw, None)) is not None:
            group.lease_again(bare, holder, now)
        else:
            group = RolloutGroup(bare, draw, holder, now, self._earlier_attempts(lease, draw))
        self.open_leases[lease.id] = group
        self.ledger.record_grant(lease.id, lease.kind, lease.grant)
        return group

    def _earlier_attempts(self, lease: Lease, draw: int) -> int:
        """Take the number of earlier attempts of a new group's question."""
        if lease.kind is LeaseKind.TRAIN:
            return self._requeued_attempts.pop(draw, 0)
        if self._evaluation_queue and self._evaluation_queue[0][0].id == lease.question.id:
            return self._evaluation_queue.popleft()[1]
        return 0

    def accept_subtree(self, group: RolloutGroup, subtree: Subtree, encoded: bytes = b"") -> bool:
        """Add a subtree to its ``group``, and its message if that is at hand; False if it was there already.

        Raises:
            ContractError: the group is closed.
            TreeError: the subtree does not fit its tree, is not sound or beyond the staleness bound. In any case nothing
                is changed.
        """
        if group.state is GroupState.SETTLING:
            raise ContractError(f"Lease {subtree.lease} reached the staleness bound; its group is closed.")
        check_subtree(group, subtree, self._vocabulary)
        if not group.add_subtree(subtree, encoded or subtree_to_bytes(subtree)):
            return False
        self._charge_subtree(group, subtree)
        return True

    def _charge_subtree(self, group: RolloutGroup, subtree: Subtree) -> None:
        if group.has_open_lease:
            self.ledger.record_spend(subtree.lease, Budget.for_cost(subtree.cost))
        else:
            self.ledger.record_late_spend(group.lease.kind, Budget.for_cost(subtree.cost))

    def end_lease(self, end: LeaseEnd, *, excused: bool = False) -> RolloutGroup:
        """Close a lease and move its group to its next state. ``excused``: no attempt is counted.

        Raises:
            ContractError: the lease is not open.
        """
        group = self.require_open_lease(end.lease)
        del self.open_leases[end.lease]
        if end.reason.silent:
            self.ledger.forfeit_lease(end.lease)
        else:
            self.ledger.record_spend(end.lease, Budget.for_cost(end.unaccounted))
            self.ledger.refund_lease(end.lease)
        if group.state is GroupState.SETTLING:
            group.move_to(GroupState.SETTLED)
            return group
        group.attempts += group.counts_against_question(end) and not excused
        releasable = group.can_be_leased_again(self._max_releasable_tokens) and not used_all_attempts(group)
        self._close_or_requeue(group, end.reason.value, finished=not (end.reason.unfinished and releasable))
        return group

    def _close_or_requeue(self, group: RolloutGroup, why: str, *, finished: bool) -> None:
        """Close a group that has leaves and is ``finished``; else lease it again, unless it has used all attempts."""
        is_eval = group.lease.kind is LeaseKind.EVAL
        closes = group.has_leaves and finished
        if not closes and not used_all_attempts(group):
            self._requeue(group)
        elif is_eval:
            group.move_to(GroupState.READY if closes else GroupState.SET_ASIDE)
            self.evaluation_answers.record_answer(group)
        elif closes:
            self.train_queue.add_ready(group)
        else:
            group.move_to(GroupState.SET_ASIDE)
            self.set_aside_counts[why] += 1

    def _requeue(self, group: RolloutGroup) -> None:
        if group.lease.kind is LeaseKind.TRAIN and group.has_leaves:
            group.move_to(GroupState.AWAITING_LEASE)
            self.unfinished_groups[group.draw] = group
            return
        group.move_to(GroupState.REQUEUED)
        if group.lease.kind is LeaseKind.TRAIN:
            self._requeued_attempts[group.draw] = group.attempts
            self._question_queue.requeue_draw(group.draw)
        elif group.lease.min_version == self.version:  # else a newer evaluation has begun, with leases of its own
            self._evaluation_queue.append((group.lease.question, group.attempts))

    def queue_evaluation(self, version: PolicyVersion, questions: list[Question]) -> None:
        """Queue the evaluation leases of ``version`` that are not open; those of an earlier version are dropped."""
        leases = (group.lease for group in self.open_leases.values())
        out = {lease.question.id for lease in leases if lease.kind is LeaseKind.EVAL and lease.min_version == version}
        self._evaluation_queue = deque((question, 0) for question in questions if question.id not in out)

    # ---- events: closed, positions assigned

    def close_group(self, draw: int) -> RolloutGroup:
        """Close a group at the staleness bound with the leaves it has; one that has none begins again from nothing.

        Its lease, if one is open, stays so until its cost is known. Raises ContractError: no such group is open.
        """
        group = self.unfinished_groups.pop(draw, None)
        if group is None:
            leased = (g for g in self.open_leases.values() if g.draw == draw >= 0 and g.state is GroupState.LEASED)
            group = next(leased, None)
            if group is None:
                raise ContractError(f"Group {draw:07d} is not open; it cannot be closed.")
            self.open_leases[group.lease.id] = group.split_off_lease()
        group.attempts += not group.has_leaves
        self._close_or_requeue(group, "overdue", finished=True)
        return group

    def assign_positions(self, draws: Sequence[int], stale: Sequence[int]) -> list[RolloutGroup]:
        """Give the next positions to the groups of ``draws``; set the stale ones aside and return them.

        Raises ContractError: one is not ready.
        """
        set_aside = [self.train_queue.set_aside_ready(draw) for draw in stale]
        for _ in set_aside:
            self.set_aside_counts["stale"] += 1
        self.train_queue.assign_positions(draws)
        return set_aside

    # ---- replay and snapshots

    def replay_subtree(self, subtree: Subtree, encoded: bytes) -> RolloutGroup | None:
        """Add a subtree read from the journal; its group, or None if it was there already.

        Raises ContractError: there is no such lease.
        """
        if (group := self.find_group(subtree.lease)) is None:
            raise lease_not_open(subtree.lease)
        if not group.restore_subtree(subtree, encoded):
            return None
        self._charge_subtree(group, subtree)
        return group

    def snapshot_table(self) -> dict[str, Any]:
        """Plain data for `restore_table`, together with the groups that are open, unfinished and closed."""
        return {
            "serial": self._serial,
            "tries": dict(self._requeued_attempts),
            "set_aside": dict(self.set_aside_counts),
            "questions": self._question_queue.snapshot_draws(),
            "ledger": self.ledger.snapshot_accounts(),
            "groups": self.train_queue.snapshot_positions(),
            "answers": self.evaluation_answers.snapshot_answers(),
        }

    def restore_table(
        self,
        row: dict[str, Any],
        *,
        leased: Sequence[RolloutGroup],
        unfinished: Sequence[RolloutGroup],
        kept: Sequence[RolloutGroup],
    ) -> None:
        """Restore what `snapshot_table` gave, with the groups of `RolloutGroup.from_snapshot`."""
        self._serial, self._requeued_attempts = row["serial"], dict(row["tries"])
        self.set_aside_counts = Counter(row["set_aside"])
        self._question_queue.restore_draws(row["questions"])
        self.ledger.restore_accounts(row["ledger"])
        self.train_queue.restore_positions(row["groups"], kept)
        self.evaluation_answers.restore_answers(row["answers"])
        self.open_leases = OpenLeaseIndex(leased)
        self.unfinished_groups = {group.draw: group for group in unfinished}
