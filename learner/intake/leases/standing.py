"""What the lease book knows, and what follows from it. Pure. Only `LeaseBook`, which is one, changes it."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from learner.intake.leases.budget_ledger import Ledger
from learner.intake.leases.evaluation import Answers
from learner.intake.leases.open_leases import Holdings
from learner.intake.leases.question_queue import QuestionQueue
from learner.intake.leases.rollout_group import GroupQueue, OpenGroup
from treegrpo.core.lease import LeaseKind, Plan
from treegrpo.core.question import Question
from treegrpo.core.step import PolicyVersion


class Standing:
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
        self.batch = batch
        self._max_lag = max_lag
        self._total = total
        self._vocabulary = vocabulary
        self._mark = mark
        self._evaluation: deque[tuple[Question, int]] = deque()
        """What is to be evaluated, with the tries it took so far."""
        self._serial = 0
        self._tries: dict[int, int] = {}
        """Of draws that were put back."""
        self.open = Holdings()
        self.unfinished: dict[int, OpenGroup] = {}
        """Training groups with leaves that wait for another lease, by draw."""
        self.set_aside: Counter[str] = Counter()
        """Training draws that were given up without a leaf, by why."""
        self.groups = GroupQueue()
        self.ledger = Ledger()
        self.answers = Answers()
        self.version: PolicyVersion | None = None

    def out(self, kind: LeaseKind) -> int:
        """Leases of a kind that are out and whose work is still wanted."""
        return self.open.wanted(kind)

    @property
    def most(self) -> int:
        """Training groups that may be on their way at once."""
        return (self._max_lag + 1) * self.batch

    @property
    def limit(self) -> int:
        """Training leases that may be out now, by the staleness bound and by what the run still needs."""
        return max(0, min(self.most - self.groups.waiting, self._total - self.groups.closed))

    @property
    def has_work(self) -> bool:
        """Whether there is anything to lease, and room for it."""
        if self.version is None:
            return False
        room = self.limit - self.out(LeaseKind.TRAIN) - len(self.unfinished)
        return bool(self._evaluation) or room > 0 or bool(self.movable)

    @property
    def movable(self) -> list[OpenGroup]:
        """The unfinished groups that another sampler can go on with: the policy is as new as the one they were begun with."""
        step = self.version.step if self.version else -1
        return [group for group in self.unfinished.values() if group.age <= step]

    @property
    def base(self) -> int:
        """The policy step that the next groups to be taken are trained from."""
        return (self.version.step if self.version else 0) + self.groups.in_training // self.batch

    def find(self, lease: str) -> OpenGroup | None:
        """The group that still takes subtrees of a lease: it is open, or was lost and nobody has gone on with it yet.

        Once another sampler goes on, it makes nodes of the same ids as those that the lost lease may still bring.
        """
        return self.open.get(lease) or next((group for group in self.unfinished.values() if group.lease.id == lease), None)

    def state(self) -> dict[str, Any]:
        """Plain data to be restored from, together with the groups that are open, unfinished and closed."""
        return {
            "serial": self._serial,
            "tries": dict(self._tries),
            "set_aside": dict(self.set_aside),
            "questions": self._queue.state(),
            "ledger": self.ledger.state(),
            "groups": self.groups.state(),
            "answers": self.answers.state(),
        }

    def restore(
        self, state: dict[str, Any], *, open_: list[OpenGroup], unfinished: list[OpenGroup], kept: list[OpenGroup]
    ) -> None:
        """Become what `state` was taken of."""
        self._serial, self._tries, self.set_aside = state["serial"], dict(state["tries"]), Counter(state["set_aside"])
        self._queue.restore(state["questions"])
        self.ledger.restore(state["ledger"])
        self.groups.restore(state["groups"], kept)
        self.answers.restore(state["answers"])
        self.open = Holdings(open_)
        self.unfinished = {group.draw: group for group in unfinished}
