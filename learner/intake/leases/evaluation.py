"""One evaluation: every held-out question once, greedily, by the samplers. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from learner.intake.leases.rollout_group import RolloutGroup
from treegrpo.core.question import Question
from treegrpo.core.step import Leaf, PolicyVersion
from treegrpo.wire.trainer_protocol import Evaluation


class EvaluationAnswers:
    """How the evaluation leases of the newest evaluated version ended. Part of the lease table, so a restart keeps them."""

    def __init__(self) -> None:
        self.version: PolicyVersion | None = None
        self.leaves: dict[str, Leaf | None] = {}
        """By question id; None where the episode failed."""

    def record_answer(self, group: RolloutGroup) -> None:
        """Count a closed evaluation group; one of an older version is ignored."""
        version = group.lease.min_version
        if self.version is None or version > self.version:
            self.version, self.leaves = version, {}
        if version == self.version:
            self.leaves[group.lease.question.id] = next((leaf for _, leaf in group.group.leaves()), None)

    def snapshot_answers(self) -> dict[str, Any]:
        """Plain data for `restore_answers`."""
        leaves = {question: asdict(leaf) if leaf else None for question, leaf in self.leaves.items()}
        return {"version": str(self.version) if self.version else None, "leaves": leaves}

    def restore_answers(self, row: dict[str, Any]) -> None:
        """Restore what `snapshot_answers` gave."""
        self.version = PolicyVersion.parse(row["version"]) if row["version"] else None
        self.leaves = {question: Leaf(**leaf) if leaf else None for question, leaf in row["leaves"].items()}


@dataclass(frozen=True, slots=True)
class EvaluationRound:
    """One evaluation of a version, and what is missing of it."""

    version: PolicyVersion
    questions: list[Question]
    answers: EvaluationAnswers = field(default_factory=EvaluationAnswers)

    @property
    def _leaves(self) -> dict[str, Leaf | None]:
        """The answers to this round's questions by its version."""
        if self.answers.version != self.version:
            return {}
        return {q.id: self.answers.leaves[q.id] for q in self.questions if q.id in self.answers.leaves}

    @property
    def missing_questions(self) -> list[Question]:
        """Questions without an outcome."""
        known = self._leaves
        return [question for question in self.questions if question.id not in known]

    @property
    def is_done(self) -> bool:
        return not self.missing_questions

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
