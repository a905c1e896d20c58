"""Subtrees that must be refused, each with the field that is wrong and what the sentence says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.intake.builders import VERSION, VOCABULARY, chain, step
from treegrpo.core.step import ROOT, Leaf, Step, StepStatus, Subtree, VersionSpan

NOTHING = np.zeros(0, np.uint32)


@dataclass(frozen=True)
class InvalidSubtree:
    """What goes wrong when ``of(lease)`` follows ``chain(lease)``, a prompt of 7 ids and the nodes 1 ─► 2, a leaf."""

    of: Callable[[str], Subtree]
    field: str
    says: str
    """After "Group NAME, tree "."""


def _branch(
    *steps: Step, leaves: Sequence[Leaf] = (), tree: int = 0, index: int = 1, parent: int = 1, prompt: Any = NOTHING
) -> Callable[[str], Subtree]:
    return lambda lease: Subtree(lease, tree, index, parent, steps, tuple(leaves), prompt)


def _leaf(node: int, reward: float = 1.0) -> Leaf:
    return Leaf(node, {"em": reward})


def _logprobs(place: int, value: float) -> Step:
    values = np.full(4, -0.5, np.float32)
    values[place] = value
    return replace(step(12, 11), logprobs=values)


def _spans(*bounds: tuple[int, int]) -> Step:
    return replace(step(11, 1), spans=tuple(VersionSpan(VERSION, *pair) for pair in bounds))


def _ids(*ids: int) -> Any:
    return np.array(ids, np.uint32)


SHAPES = {
    "below nobody": InvalidSubtree(_branch(step(11, 5), parent=5), "parent", "0: subtree 1 hangs below unknown parent 5, which"),
    "below a leaf": InvalidSubtree(
        _branch(step(11, 2), parent=2), "parent", "0: subtree 1 hangs below node 2, where an episode ended"
    ),
    "unknown parent": InvalidSubtree(_branch(step(11, 9)), "parent", "0, node 11: unknown parent 9; parents come first."),
    "cycle": InvalidSubtree(
        _branch(step(11, 12), step(12, 11)), "parent", "0, node 11: parent 12 does not come before it (a cycle"
    ),
    "own parent": InvalidSubtree(_branch(step(11, 11)), "parent", "0, node 11: parent 11 does not come before it (a cycle"),
    "node sent before": InvalidSubtree(_branch(step(2, 1)), "node", "0, node 2 is there a second time"),
    "node twice": InvalidSubtree(_branch(step(11, 1), step(11, 1)), "node", "0, node 11 is there a second time"),
    "the root as a step": InvalidSubtree(_branch(step(ROOT, 1)), "node", "0, node 0 is there a second time"),
    "leaf with a child": InvalidSubtree(
        _branch(step(11, 1), step(12, 11), leaves=[_leaf(11)]), "parent", "0, node 12: parent 11 is where an episode ended"
    ),
    "step after a failure": InvalidSubtree(
        _branch(step(11, 1, status=StepStatus.TOOL_ERROR), step(12, 11)), "parent", "0, node 12: parent 11 is where an episode"
    ),
    "leaf that is no step": InvalidSubtree(
        _branch(step(11, 1), leaves=[_leaf(1)]), "leaf", "0, node 1: the leaf is not one of its steps"
    ),
    "two leaves at one node": InvalidSubtree(_branch(step(11, 1), leaves=[_leaf(11)] * 2), "leaf", "0, node 11 has two leaves"),
    "failed leaf": InvalidSubtree(
        _branch(step(11, 1, status=StepStatus.ENGINE_ERROR), leaves=[_leaf(11)]),
        "status",
        "0, node 11: the leaf has status engine_error",
    ),
    "leaf without action": InvalidSubtree(
        _branch(step(11, 1, actions=0), leaves=[_leaf(11)]), "action", "0, node 11: the leaf has an empty action"
    ),
    "no steps": InvalidSubtree(_branch(), "steps", "0: subtree 1 is empty"),
    "no prompt": InvalidSubtree(
        _branch(step(1, 0), tree=1, index=0, parent=0), "prompt", "1: its first subtree lacks the prompt"
    ),
    "no first subtree": InvalidSubtree(
        _branch(step(1, 0), tree=1, parent=0), "prompt", "1: subtree 1 came before subtree 0, which"
    ),
}
NUMBERS = {
    "positive logprob": InvalidSubtree(
        _branch(step(11, 1), _logprobs(2, 0.31)),
        "logprobs",
        "0, node 12: logprobs[2] is 0.31; a log-probability is finite and at most 0.",
    ),
    "logprob nan": InvalidSubtree(_branch(step(11, 1), _logprobs(3, np.nan)), "logprobs", "0, node 12: logprobs[3] is nan;"),
    "logprob inf": InvalidSubtree(_branch(step(11, 1), _logprobs(0, np.inf)), "logprobs", "0, node 12: logprobs[0] is inf;"),
    "logprob -inf": InvalidSubtree(_branch(step(11, 1), _logprobs(0, -np.inf)), "logprobs", "0, node 12: logprobs[0] is -inf;"),
    "too few logprobs": InvalidSubtree(
        _branch(replace(step(11, 1), logprobs=np.zeros(3, np.float32))),
        "logprobs",
        "0, node 11: logprobs has 3 values and action 4 tokens",
    ),
    "no spans": InvalidSubtree(_branch(_spans()), "spans", "0, node 11: spans cover 0 tokens and action has 4"),
    "short spans": InvalidSubtree(_branch(_spans((0, 1), (1, 3))), "spans", "0, node 11: spans cover 3 tokens and action has 4"),
    "long spans": InvalidSubtree(_branch(_spans((0, 5))), "spans", "0, node 11: spans cover 5 tokens and action has 4"),
    "a gap in spans": InvalidSubtree(
        _branch(_spans((0, 1), (2, 4))), "spans", "0, node 11: spans[1] covers tokens 2 to 4, but token 1 comes"
    ),
    "an empty span": InvalidSubtree(
        _branch(_spans((0, 0), (0, 4))), "spans", "0, node 11: spans[0] covers tokens 0 to 0, but token 0 comes"
    ),
    "reward nan": InvalidSubtree(
        _branch(step(11, 1), leaves=[_leaf(11, np.nan)]), "rewards", "0, node 11: rewards['em'] is nan; it must be finite."
    ),
    "rewards beyond float": InvalidSubtree(
        _branch(step(11, 1), leaves=[Leaf(11, {"a": 1e308, "b": 1e308})]), "rewards", "0, node 11: rewards add up to inf"
    ),
    "metric inf": InvalidSubtree(
        _branch(step(11, 1), leaves=[Leaf(11, {}, {"em": np.inf})]),
        "metrics",
        "0, node 11: metrics['em'] is inf; it must be finite.",
    ),
}
IDS = {
    "action": InvalidSubtree(
        _branch(replace(step(11, 1), action=_ids(1, 2, VOCABULARY, 3))),
        "action",
        "0, node 11: action[2] is 50; the model's vocabulary has 50 ids",
    ),
    "observation": InvalidSubtree(
        _branch(step(11, 1), replace(step(12, 11), observation=_ids(2**32 - 1))),
        "observation",
        "0, node 12: observation[0] is 4294967295;",
    ),
    "prompt": InvalidSubtree(
        lambda lease: replace(chain(lease, tree=1), prompt=_ids(1, 2**31)), "prompt", "1: prompt[1] is 2147483648; the model's"
    ),
}
"""Beyond a vocabulary of VOCABULARY ids, of which a tree alone knows nothing."""
EVERY = {**SHAPES, **NUMBERS, **{f"{name} beyond the vocabulary": case for name, case in IDS.items()}}
