"""Whether a subtree is what its lease asked for; whether it fits its tree, `Tree.add` says."""

from __future__ import annotations

from learner.intake.groups import OpenGroup
from treegrpo.errors import TreeError
from treegrpo.lease import LeaseKind
from treegrpo.size import check_size
from treegrpo.soundness import check_vocabulary, name
from treegrpo.step import Subtree


def check_asked_for(group: OpenGroup, subtree: Subtree, vocabulary: int) -> None:
    """It is in the plan, within its limits, of the model's ``vocabulary`` and of a policy young enough. Raises TreeError."""
    plan, where = group.lease.plan, name(subtree.lease, subtree.tree, group.group.id)
    if subtree.tree >= plan.trees:
        raise TreeError(f"Group {group.group.id}: tree {subtree.tree} is not one of its plan's {plan.trees}, from 0 on.", "tree")
    if subtree.index >= plan.branches:
        raise TreeError(f"{where}: subtree {subtree.index} is not one of its plan's {plan.branches}, from 0 on.", "index")
    check_size(subtree, group.depth(subtree.tree, subtree.parent), plan, where)
    check_vocabulary(subtree.prompt, subtree.steps, vocabulary, where)
    _check_age(group, subtree, where)


def _check_age(group: OpenGroup, subtree: Subtree, where: str) -> None:
    """A trainer that goes back has samplers go back; what they then sample is older than the group's place in line allows."""
    oldest = min((span.version.step for step in subtree.steps for span in step.spans), default=group.age)
    if group.lease.kind is LeaseKind.TRAIN and oldest < group.age:
        raise TreeError(
            f"{where}: subtree {subtree.index} has tokens of policy step {oldest}; its lease asks for {group.age} or later.",
            "age",
        )
