"""The lease book: who rolls out what, within the staleness bound. Pure: no network, no clock, no disk.

Staleness bounds the number of training groups that are on their way:

    leases out + groups ready + groups in training ≤ (max_lag + 1) · batch

A group granted at version v meets at most that many groups minus itself before the trainer, hence is trained at most
max_lag versions later, if groups close in the order they were granted. A slow one that is overtaken reaches the bound
earlier: it is told to stop expanding and trains on the leaves it has (`overdue`).

Every change is an event: granted, accepted, ended. The service writes each to the journal; after a restart the
journal's events go through the same methods.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Iterator

from learner.intake.groups import GroupQueue, OpenGroup
from learner.intake.ledger import Ledger
from learner.intake.questions import QuestionQueue
from treegrpo.budget import Budget
from treegrpo.errors import ContractError, TreeError
from treegrpo.lease import Lease, LeaseEnd, LeaseEndReason, LeaseKind, Plan
from treegrpo.question import Question
from treegrpo.soundness import check_vocabulary, name
from treegrpo.tree import PolicyVersion, Subtree

log = logging.getLogger(__name__)


class LeaseBook:
    def __init__(
        self, queue: QuestionQueue, plan: Plan, *, seed: int, batch: int, max_lag: int, total: int, vocabulary: int, mark: str
    ) -> None:
        """Begin with nothing out.

        Args:
            queue: the training questions.
            plan: of a training lease.
            seed: of the run.
            batch: groups of a step.
            max_lag: the staleness bound, in versions.
            total: training groups of the whole run; no more are leased than it still needs.
            vocabulary: token ids of the model.
            mark: of this process, in every lease id: a lease that a crash kept out of the journal never shares its id.
        """
        self._queue = queue
        self._plan = plan
        self._seed = seed
        self._batch = batch
        self._max_lag = max_lag
        self._total = total
        self._vocabulary = vocabulary
        self._mark = mark
        self._evaluation: deque[Question] = deque()
        self._serial = 0
        self.open: dict[str, OpenGroup] = {}
        self.groups = GroupQueue()
        self.ledger = Ledger()
        self.version: PolicyVersion | None = None

    # ---- how many

    def out(self, kind: LeaseKind) -> int:
        """Leases of a kind that are out."""
        return sum(group.lease.kind is kind for group in self.open.values())

    @property
    def limit(self) -> int:
        """Training leases that may be out now, by the staleness bound and by what the run still needs."""
        bound = (self._max_lag + 1) * self._batch - self.groups.waiting
        return max(0, min(bound, self._total - self.groups.end))

    # ---- events

    def next_lease(self) -> tuple[Lease, int] | None:
        """The next lease to grant and its draw (-1: evaluation), or None when the bound or the work is exhausted.

        Evaluation goes first: it is short, and who waits for it waits for all of it.
        """
        if self.version is None:
            return None
        if self._evaluation:
            return self._lease(LeaseKind.EVAL, self._evaluation.popleft(), self._plan.as_eval(), self.version), -1
        if self.out(LeaseKind.TRAIN) >= self.limit:
            return None
        draw = self._queue.draw()
        return self._lease(LeaseKind.TRAIN, self._queue[draw], self._plan, self.version, draw), draw

    def _lease(self, kind: LeaseKind, question: Question, plan: Plan, version: PolicyVersion, draw: int = -1) -> Lease:
        seed = zlib.crc32(f"{self._seed}/{draw}/{question.id}".encode())
        return Lease(f"{kind.value}-{self._serial:07d}-{self._mark}", kind, question, plan, plan.grant, seed, version)

    def granted(self, lease: Lease, draw: int, holder: str, now: float | None) -> None:
        self._serial += 1
        self.open[lease.id] = OpenGroup(lease, draw, holder, now)
        self.ledger.grant(lease.id, lease.kind, lease.grant)

    def accept(self, subtree: Subtree) -> bool:
        """Add a subtree to its group; False if it was there already.

        Raises:
            ContractError: the lease is not open.
            TreeError: the subtree does not fit its tree or is not sound. In either case nothing is changed.
        """
        group = self.open.get(subtree.lease)
        if group is None:
            raise ContractError(f"Lease {subtree.lease} is not open; its work is no longer wanted.")
        if subtree.tree >= group.lease.plan.trees:
            trees = group.lease.plan.trees
            raise TreeError(f"Group {group.group.id}: tree {subtree.tree} is not one of its plan's {trees}, from 0 on.", "tree")
        where = name(subtree.lease, subtree.tree, group.group.id)
        check_vocabulary(subtree.prompt, subtree.steps, self._vocabulary, where)
        if not group.add(subtree):
            return False
        self.ledger.spend(subtree.lease, Budget.of(subtree.cost))
        return True

    def ended(self, end: LeaseEnd) -> OpenGroup:
        """Close a lease: its group goes in line for the trainer, or its question back into the queue.

        Raises:
            ContractError: the lease is not open.
        """
        group = self.open.pop(end.lease, None)
        if group is None:
            raise ContractError(f"Lease {end.lease} is not open; it has ended before.")
        if end.reason is LeaseEndReason.LOST:
            self.ledger.forfeit(end.lease)
            self._put_back(group)
        else:
            self.ledger.spend(end.lease, Budget.of(end.unaccounted))
            self.ledger.refund(end.lease)
            if group.lease.kind is LeaseKind.TRAIN and group.has_leaves:
                self.groups.close(group)
        return group

    def _put_back(self, group: OpenGroup) -> None:
        if group.lease.kind is LeaseKind.TRAIN:
            self._queue.put_back(group.draw)
        else:
            self._evaluation.append(group.lease.question)

    def evaluate(self, questions: list[Question]) -> None:
        """Put evaluation leases in line; those of an earlier evaluation still in line are dropped."""
        self._evaluation = deque(questions)

    def replay_grant(self, lease: Lease, draw: int) -> None:
        """A grant read from the journal: its holder is gone, its draw is taken."""
        if draw >= 0:
            self._queue.taken(draw)
        self.granted(lease, draw, holder="", now=None)

    def replay_accepted(self, subtree: Subtree) -> bool:
        """A subtree read from the journal; False if it was there already.

        One that is refused by now was accepted once, so it stays in what the trainer gets: every group keeps its position,
        and the trainer, which examines all of them, leaves that one out. Raises ContractError: the lease is not open.
        """
        try:
            return self.accept(subtree)
        except TreeError as error:
            log.warning("the journal has what would be refused today: %s", error)
        self.open[subtree.lease].subtrees.append(subtree)
        self.ledger.spend(subtree.lease, Budget.of(subtree.cost))
        return True

    # ---- who must stop, who is gone

    def overdue(self) -> Iterator[OpenGroup]:
        """Training groups that one more group closing before them would push beyond the bound; marks them as told.

        A group that closes now is trained after the ⌊ready or in training / batch⌋ steps ahead of it.
        """
        if self.version is None:
            return
        ahead = (self.groups.waiting + 1) // self._batch
        for group in self.open.values():
            lag = self.version.step - group.lease.min_version.step + ahead
            if group.lease.kind is LeaseKind.TRAIN and lag > self._max_lag and not group.told_to_stop:
                group.told_to_stop = True
                yield group

    def of(self, holder: str) -> list[OpenGroup]:
        """The groups a sampler works on."""
        return [group for group in self.open.values() if group.holder == holder]
