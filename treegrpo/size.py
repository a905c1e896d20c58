"""How large a branch may be: as large as its lease's plan lets an episode be. What it says beside its tokens has limits too."""

from __future__ import annotations

from treegrpo.errors import TreeError
from treegrpo.lease import Plan
from treegrpo.step import Subtree

TEXT_LENGTH = 65536
"""Letters of a tool call."""
NUMBERS, NAME_LENGTH = 64, 64
"""Rewards and metrics of a leaf, and letters of a name."""


def check_size(subtree: Subtree, depth: int, plan: Plan, where: str) -> None:
    """A branch below ``depth`` steps is no longer than its plan lets an episode be. Raises TreeError."""
    steps, here = len(subtree.steps), f"{where}: subtree {subtree.index}"
    if depth + steps > plan.max_turns + 1:
        raise TreeError(
            f"{here} ends {depth + steps} steps below the root, and its plan's episodes have {plan.max_turns + 1} at most.",
            "steps",
        )
    if (tokens := len(subtree.prompt) + sum(step.length for step in subtree.steps)) > plan.max_context:
        raise TreeError(f"{here} has {tokens} tokens, and its plan's episodes have {plan.max_context} at most.", "tokens")
    for step in subtree.steps:
        if len(step.action) > plan.max_action_tokens:
            raise TreeError(
                f"{where}, node {step.node}: action has {len(step.action)} tokens, and the plan's turns "
                f"{plan.max_action_tokens} at most.",
                "action",
            )
        if len(step.tool) + len(step.tool_arguments) > TEXT_LENGTH:
            raise TreeError(f"{where}, node {step.node}: tool and tool_arguments are longer than {TEXT_LENGTH} letters.", "tool")
    for leaf in subtree.leaves:
        for field, numbers in (("rewards", leaf.rewards), ("metrics", leaf.metrics)):
            if len(numbers) > NUMBERS or any(len(key) > NAME_LENGTH for key in numbers):
                what = f"{field} has more than {NUMBERS} numbers, or a name of more than {NAME_LENGTH} letters"
                raise TreeError(f"{where}, node {leaf.node}: {what}.", field)
