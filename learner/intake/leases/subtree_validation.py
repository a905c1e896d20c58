"""Whether a subtree is what its lease asked for, of whom it asked; whether it fits its tree, `Tree.add` says."""

from __future__ import annotations

from itertools import islice

from learner.intake.leases.rollout_group import OpenGroup
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseKind, Plan
from treegrpo.core.step import Subtree
from treegrpo.core.validation import check_vocabulary, tree_label
from treegrpo.errors import ContractError, TreeError
from treegrpo.v1 import tree_pb2
from treegrpo.wire.codec import cost_from_pb
from treegrpo.wire.size_limits import check_size, is_cost

TOO_LATE = ("lease", "overdue", "age")
"""Reasons of a refusal that are no fault of who sent it: its lease, its group or its policy was no longer wanted."""


def check_asked_for(group: OpenGroup, subtree: Subtree, vocabulary: int) -> None:
    """It is in the plan, within its limits, of the model's ``vocabulary`` and of a policy young enough. Raises TreeError."""
    plan, where = group.lease.plan, tree_label(subtree.lease, subtree.tree, group.group.id)
    if subtree.tree >= plan.trees:
        raise TreeError(f"Group {group.group.id}: tree {subtree.tree} is not one of its plan's {plan.trees}, from 0 on.", "tree")
    if subtree.index >= plan.branches:
        raise TreeError(f"{where}: subtree {subtree.index} is not one of its plan's {plan.branches}, from 0 on.", "index")
    check_size(subtree, _above(group, subtree), plan, where)
    check_vocabulary(subtree.prompt, subtree.steps, vocabulary, where)
    _check_age(group, subtree, where)


def check_holder(group: OpenGroup | None, lease: str, holder: str) -> None:
    """Who speaks of a lease that is open is the one that holds it. Raises ContractError."""
    if group is not None and group.holder != holder:
        raise ContractError(f"Lease {lease} is not held by sampler {holder}; its own sampler speaks for it.")


def not_open(lease: str) -> ContractError:
    """Nobody asks for work on ``lease`` any more."""
    return ContractError(f"Lease {lease} is not open; its work is no longer wanted.")


def reason_of(group: OpenGroup | None, holder: str, error: ContractError) -> str:
    """What is wrong with a subtree that is refused, in a word; its lease is of ``group``, if it is open."""
    if group is None:
        return "lease"
    if group.holder != holder:
        return "holder"
    return error.field if isinstance(error, TreeError) else "overdue"


def cost_of(sent: tree_pb2.Subtree, plan: Plan) -> Cost:
    """What a subtree that is refused says it cost, as far as it can have."""
    costs = [cost_from_pb(step.cost) for step in islice(sent.steps, plan.leaves * (plan.max_turns + 1))]
    return sum((cost for cost in costs if is_cost(cost, plan, steps=1)), Cost())


def _above(group: OpenGroup, subtree: Subtree) -> tuple[int, int]:
    """Steps from the root down to where a subtree hangs, and tokens; none where that is not known, which `Tree.add` refuses."""
    tree = group.group.trees.get(subtree.tree)
    if tree is None:
        return 0, 0
    path = tree.path(subtree.parent) if subtree.parent in tree.steps else []
    return len(path), len(tree.prompt) + sum(step.length for step in path)


def _check_age(group: OpenGroup, subtree: Subtree, where: str) -> None:
    """A trainer that goes back has samplers go back; what they then sample is older than the group's place in line allows."""
    oldest = min((span.version.step for step in subtree.steps for span in step.spans), default=group.age)
    if group.lease.kind is LeaseKind.TRAIN and oldest < group.age:
        raise TreeError(
            f"{where}: subtree {subtree.index} has tokens of policy step {oldest}; its lease asks for {group.age} or later.",
            "age",
        )
