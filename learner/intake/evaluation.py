"""One evaluation: every held-out question once, greedily, by the samplers. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from learner.intake.groups import OpenGroup
from treegrpo.handoff import Evaluation
from treegrpo.question import Question
from treegrpo.tree import Leaf, PolicyVersion


@dataclass(slots=True)
class Round:
    version: PolicyVersion
    questions: list[Question]
    _leaves: dict[str, Leaf | None] = field(default_factory=dict[str, Leaf | None])
    """By question id; None where the episode failed."""

    def close(self, group: OpenGroup) -> None:
        """Count a closed evaluation group."""
        leaf = next((leaf for _, leaf in group.group.leaves()), None)
        self._leaves[group.lease.question.id] = leaf

    @property
    def done(self) -> bool:
        return len(self._leaves) == len(self.questions)

    def result(self) -> Evaluation:
        """Means over the episodes that did not fail; the failed ones are counted apart."""
        leaves = [leaf for leaf in self._leaves.values() if leaf is not None]
        count = max(1, len(leaves))
        return Evaluation(
            done=self.done,
            questions=len(self._leaves),
            em=sum(leaf.metrics.get("em", 0.0) for leaf in leaves) / count,
            reward=sum(leaf.reward for leaf in leaves) / count,
            failed=len(self._leaves) - len(leaves),
        )
