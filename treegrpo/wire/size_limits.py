"""Size limits of a subtree and a lease end, derived from the plan of the lease.

A subtree is a branch, as our samplers send it, or any tree below one node, which the contract allows: several leaves, and more
steps than one episode. So depth and tokens are counted along each path from the root, and a subtree has as many leaves and
steps at most as a whole group of its plan.
"""

from __future__ import annotations

import math

from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, Plan
from treegrpo.core.step import Leaf, Step, Subtree
from treegrpo.errors import ContractError, TreeError
from treegrpo.net.limits import MESSAGE_BYTES

TEXT_LENGTH = 65536
"""Letters of a tool call."""
NUMBERS, NAME_LENGTH = 64, 64
"""Rewards and metrics of a leaf, and letters of a name."""
LARGEST = 1e9
"""A reward or a metric, either way: their sums stay numbers."""
BASE_BYTES, TOKEN_BYTES = 512 << 10, 32
"""Of a sampler's message: a Hello that names all its leases, and what a token of a branch may take. Its id and log-probability
are 8 bytes, the text of a tool call that it is part of some 4; the rest is for branches that fork, which the contract allows."""
TIMES = 1024
"""No step is computed as often, by retries and new weights: what costs more is no cost. The books add up to 64 bits."""
SECONDS = 1e7


def message_bytes(plan: Plan) -> int:
    """The largest message of a sampler in a run of ``plan``."""
    return min(MESSAGE_BYTES, BASE_BYTES + TOKEN_BYTES * plan.max_context)


def check_size(subtree: Subtree, above: tuple[int, int], plan: Plan, where: str) -> None:
    """Check that a subtree is no larger than its plan allows; ``above``: steps and tokens on the path to it. Raises TreeError."""
    _check_paths(subtree, above, plan, f"{where}: subtree {subtree.index}")
    for step in subtree.steps:
        _check_step(step, plan, f"{where}, node {step.node}")
    for leaf in subtree.leaves:
        _check_leaf(leaf, f"{where}, node {leaf.node}")


def check_count(steps: int, leaves: int, plan: Plan, here: str) -> None:
    """Check, before decoding, that a subtree has no more steps and leaves than a group of its ``plan``. Raises TreeError."""
    if leaves > plan.leaves or steps > plan.leaves * (plan.max_turns + 1):
        raise TreeError(f"{here} has more leaves or steps than all {plan.leaves} episodes of its group may have.", "steps")


def _check_paths(subtree: Subtree, above: tuple[int, int], plan: Plan, here: str) -> None:
    turns = plan.max_turns + 1
    check_count(len(subtree.steps), len(subtree.leaves), plan, here)
    start = (above[0], above[1] + len(subtree.prompt))
    ends = {subtree.parent: start}
    for step in subtree.steps:  # an unknown parent is for `Tree.append_subtree` to refuse
        depth, tokens = ends.get(step.parent, start)
        ends[step.node] = (depth + 1, tokens + step.length)
    depth, tokens = max(end[0] for end in ends.values()), max(end[1] for end in ends.values())
    if depth > turns:
        raise TreeError(f"{here} ends {depth} steps below the root, and its plan's episodes have {turns} at most.", "steps")
    if tokens > plan.max_context:
        raise TreeError(
            f"{here} has a path of {tokens} tokens, and its plan's episodes have {plan.max_context} at most.", "tokens"
        )


def _check_step(step: Step, plan: Plan, here: str) -> None:
    if len(step.action) > plan.max_action_tokens:
        raise TreeError(
            f"{here}: action has {len(step.action)} tokens, and the plan's turns {plan.max_action_tokens} at most.", "action"
        )
    if len(step.tool) + len(step.tool_arguments) > TEXT_LENGTH:
        raise TreeError(f"{here}: tool and tool_arguments are longer than {TEXT_LENGTH} letters.", "tool")
    if not is_cost(step.cost, plan, steps=1):
        raise TreeError(f"{here}: cost is {step.cost}, which no step of its plan can cost.", "cost")


def _check_leaf(leaf: Leaf, here: str) -> None:
    for field, numbers in (("rewards", leaf.rewards), ("metrics", leaf.metrics)):
        if len(numbers) > NUMBERS or max(map(len, numbers), default=0) > NAME_LENGTH:
            what = f"{field} has more than {NUMBERS} numbers, or a name of more than {NAME_LENGTH} letters"
            raise TreeError(f"{here}: {what}.", field)
        if math.isfinite(sum(numbers.values())) and max(map(abs, numbers.values()), default=0.0) > LARGEST:
            raise TreeError(f"{here}: {field} has a number beyond {LARGEST:g}.", field)


def check_end(end: LeaseEnd, plan: Plan) -> None:
    """Check that the additional cost in a lease end is possible. Raises ContractError."""
    if not is_cost(end.unaccounted, plan, steps=plan.leaves * (plan.max_turns + 1)):
        raise ContractError(f"Lease {end.lease} ends at a cost of {end.unaccounted}, which its plan cannot cost.")


def is_cost(cost: Cost, plan: Plan, steps: int) -> bool:
    """Whether a number of steps of a plan can have had this cost."""
    most = TIMES * steps * plan.max_context
    counts = max(cost.prefilled, cost.cached, cost.decoded)
    return counts <= most and cost.tool_calls <= TIMES * steps and 0.0 <= cost.seconds <= SECONDS
