"""One evaluation: every held-out question once, greedily, by the samplers. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from learner.intake.leases.rollout_group import OpenGroup
from treegrpo.core.question import Question
from treegrpo.core.step import Leaf, PolicyVersion
from treegrpo.wire.trainer_protocol import Evaluation


class Answers:
    """How the evaluation leases of the newest evaluated version ended. Part of the lease book, so a restart keeps them."""

    def __init__(self) -> None:
        self.version: PolicyVersion | None = None
        self.leaves: dict[str, Leaf | None] = {}
        """By question id; None where the episode failed."""

    def add(self, group: OpenGroup) -> None:
        """Count a closed evaluation group; one of an older version is late and counts no more."""
        version = group.lease.min_version
        if self.version is None or version > self.version:
            self.version, self.leaves = version, {}
        if version == self.version:
            self.leaves[group.lease.question.id] = next((leaf for _, leaf in group.group.leaves()), None)

    def state(self) -> dict[str, Any]:
        """Plain data to be restored from."""
        leaves = {question: asdict(leaf) if leaf else None for question, leaf in self.leaves.items()}
        return {"version": str(self.version) if self.version else None, "leaves": leaves}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken of."""
        self.version = PolicyVersion.parse(state["version"]) if state["version"] else None
        self.leaves = {question: Leaf(**leaf) if leaf else None for question, leaf in state["leaves"].items()}


@dataclass(frozen=True, slots=True)
class Round:
    version: PolicyVersion
    questions: list[Question]
    answers: Answers = field(default_factory=Answers)

    @property
    def _leaves(self) -> dict[str, Leaf | None]:
        """Of this round's version and questions."""
        if self.answers.version != self.version:
            return {}
        return {q.id: self.answers.leaves[q.id] for q in self.questions if q.id in self.answers.leaves}

    @property
    def missing(self) -> list[Question]:
        """Questions without an outcome."""
        known = self._leaves
        return [question for question in self.questions if question.id not in known]

    @property
    def done(self) -> bool:
        return not self.missing

    def result(self) -> Evaluation:
        """Means over the episodes that did not fail; the failed ones are counted apart."""
        known = self._leaves
        leaves = [leaf for leaf in known.values() if leaf is not None]
        count = max(1, len(leaves))
        return Evaluation(
            done=len(known) == len(self.questions),
            questions=len(known),
            em=sum(leaf.metrics.get("em", 0.0) for leaf in leaves) / count,
            reward=sum(leaf.reward for leaf in leaves) / count,
            failed=len(known) - len(leaves),
        )
