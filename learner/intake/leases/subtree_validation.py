"""Validation of subtrees: sent by the holder of the lease, and within its plan. `Tree.append_subtree` checks the tree."""

from __future__ import annotations

from itertools import islice

from learner.intake.leases.rollout_group import RolloutGroup
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseKind, Plan
from treegrpo.core.step import Subtree
from treegrpo.core.validation import check_vocabulary, tree_label
from treegrpo.errors import ContractError, TreeError
from treegrpo.v1 import tree_pb2
from treegrpo.wire.codec import cost_from_pb
from treegrpo.wire.size_limits import check_size, is_cost

TOO_LATE_REASONS = ("lease", "overdue", "age")
"""Reasons of a rejection that are no fault of the sampler: its lease, its group or its policy was no longer needed."""


def check_subtree(group: RolloutGroup, subtree: Subtree, vocabulary: int) -> None:
    """Check a subtree against its plan, the model's ``vocabulary`` and the staleness bound. Raises TreeError."""
    plan, where = group.lease.plan, tree_label(subtree.lease, subtree.tree, group.group.id)
    if subtree.tree >= plan.trees:
        raise TreeError(f"Group {group.group.id}: tree {subtree.tree} is not one of its plan's {plan.trees}, from 0 on.", "tree")
    if subtree.index >= plan.branches:
        raise TreeError(f"{where}: subtree {subtree.index} is not one of its plan's {plan.branches}, from 0 on.", "index")
    check_size(subtree, _parent_path(group, subtree), plan, where)
    check_vocabulary(subtree.prompt, subtree.steps, vocabulary, where)
    _check_policy_step(group, subtree, where)


def check_lease_holder(group: RolloutGroup | None, lease: str, holder: str) -> RolloutGroup:
    """The group of ``lease``. Raises ContractError: there is none, or another sampler holds the lease."""
    if group is None:
        raise lease_not_open(lease)
    if group.holder != holder:
        raise ContractError(f"Lease {lease} is not held by sampler {holder}; only its own sampler may send for it.")
    return group


def lease_not_open(lease: str) -> ContractError:
    """The error for a message about a lease that is not open."""
    return ContractError(f"Lease {lease} is not open; its subtrees are refused.")


def rejection_reason(group: RolloutGroup | None, holder: str, error: ContractError) -> str:
    """The metric's label for a rejected subtree; ``group`` is that of its lease, if it is open."""
    if group is None:
        return "lease"
    if group.holder != holder:
        return "holder"
    return error.field if isinstance(error, TreeError) else "overdue"


def claimed_cost(sent: tree_pb2.Subtree, plan: Plan) -> Cost:
    """The cost that a rejected subtree reports, if it is possible."""
    costs = [cost_from_pb(step.cost) for step in islice(sent.steps, plan.leaves * (plan.max_turns + 1))]
    return sum((cost for cost in costs if is_cost(cost, plan, steps=1)), Cost())


def _parent_path(group: RolloutGroup, subtree: Subtree) -> tuple[int, int]:
    """Steps and tokens from the root to the parent of a subtree; none where it is unknown: `Tree.append_subtree` rejects it."""
    tree = group.group.trees.get(subtree.tree)
    if tree is None:
        return 0, 0
    path = tree.path(subtree.parent) if subtree.parent in tree.steps else []
    return len(path), len(tree.prompt) + sum(step.length for step in path)


def _check_policy_step(group: RolloutGroup, subtree: Subtree, where: str) -> None:
    """Check the age of a subtree: after the trainer has resumed from a checkpoint, samplers have an older policy."""
    limit = group.min_policy_step
    oldest = min((span.version.step for step in subtree.steps for span in step.spans), default=limit)
    if group.lease.kind is LeaseKind.TRAIN and oldest < limit:
        raise TreeError(
            f"{where}: subtree {subtree.index} has tokens of policy step {oldest}; its lease asks for {limit} or later.",
            "age",
        )
