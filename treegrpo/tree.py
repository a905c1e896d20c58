"""The vocabulary of a rollout: version, step, subtree, tree, group.

A *tree* grows from a prompt (its root, node 0). Each further *node* is one agent step: think, act, observe. A
*subtree* is what travels: the steps appended below one existing node by one expansion, down to a leaf. A *group* is
all trees of one question; its leaves are the episodes that are compared with each other.

This module is pure: no network, no clock, no torch. Token ids are uint32 and log-probabilities float32 arrays, the
engine's own from first to last (token-in, token-out).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from treegrpo.budget import Cost
from treegrpo.errors import ContractError, TreeError
from treegrpo.question import Question
from treegrpo.soundness import check_leaves, check_steps, name

TokenIds = NDArray[np.uint32]
Logprobs = NDArray[np.float32]
ROOT = 0


@dataclass(frozen=True, slots=True, order=True)
class PolicyVersion:
    """Which weights: the lineage of the run and the optimiser step in it.

    A restart that goes back to an older checkpoint begins a new lineage, so step 7 of lineage 1 is never mistaken for
    step 7 of lineage 2.
    """

    lineage: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"{self.lineage}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """The inverse of ``str``. Raises ContractError on anything else."""
        lineage, dot, step = text.partition(".")
        if not (dot and lineage.isdecimal() and step.isdecimal()):
            raise ContractError(f"{text!r} is not a policy version; one is written LINEAGE.STEP, like 1.42.")
        return cls(int(lineage), int(step))


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens ``start`` (inclusive) to ``end`` (exclusive) of an action were sampled from ``version``."""

    version: PolicyVersion
    start: int
    end: int


class StepStatus(Enum):
    """How a step ended."""

    OK = "ok"
    TRUNCATED = "truncated"
    """The turn or the context was full: a leaf, scored as it is."""
    ENGINE_ERROR = "engine_error"
    TOOL_ERROR = "tool_error"

    @property
    def failed(self) -> bool:
        """A failed step is never a leaf with a reward; its branch is left out and counted."""
        return self in (StepStatus.ENGINE_ERROR, StepStatus.TOOL_ERROR)

    @property
    def final(self) -> bool:
        """No step follows: the episode ended here, or failed."""
        return self is not StepStatus.OK


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One think → act → observe turn: a node of the tree."""

    node: int
    parent: int
    action: TokenIds
    """Tokens the policy produced, stop tokens included."""
    logprobs: Logprobs
    """Log-probability of each action token under the policy and temperature it was sampled with."""
    observation: TokenIds
    """Tokens the environment answered with; empty at a leaf."""
    spans: tuple[VersionSpan, ...] = ()
    status: StepStatus = StepStatus.OK
    tool: str = ""
    """The tool used, empty if none."""
    tool_arguments: str = ""
    valid: bool = True
    """False when the action broke the environment's protocol."""
    cost: Cost = field(default_factory=Cost)

    @property
    def length(self) -> int:
        """Tokens this node adds to its path."""
        return len(self.action) + len(self.observation)


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """The end of an episode: its rewards by name. Their sum is what the policy is trained on."""

    node: int
    rewards: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    """Reported, not trained on: exact match, searches, invalid actions."""

    @property
    def reward(self) -> float:
        return sum(self.rewards.values())


@dataclass(frozen=True, slots=True, eq=False)
class Subtree:
    """The steps one expansion appended below node ``parent`` of a tree, root side first.

    (lease, tree, index) names it once and for all: a subtree that arrives twice is accepted once. Index 0 is the
    tree's initial chain and carries the prompt.
    """

    lease: str
    tree: int
    index: int
    parent: int
    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...] = ()
    """Empty when the expansion failed."""
    prompt: TokenIds = field(default_factory=lambda: np.zeros(0, np.uint32))

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.lease, self.tree, self.index)

    @property
    def cost(self) -> Cost:
        return sum((step.cost for step in self.steps), Cost())


@dataclass(slots=True, eq=False)
class Tree:
    """All steps of one tree, by node id, and its leaves. Grows by `add`."""

    prompt: TokenIds = field(default_factory=lambda: np.zeros(0, np.uint32))
    steps: dict[int, Step] = field(default_factory=dict[int, Step])
    leaves: dict[int, Leaf] = field(default_factory=dict[int, Leaf])
    indices: set[int] = field(default_factory=set[int])

    def add(self, subtree: Subtree, group: str = "") -> bool:
        """Append a subtree; False if it was there already.

        Raises:
            TreeError: it does not fit or is not sound; nothing is changed. The sentence names ``group``, if given.
        """
        if subtree.index in self.indices:
            return False
        where = name(subtree.lease, subtree.tree, group)
        self._check_place(subtree, where)
        self._check_order(subtree, where)
        check_steps(subtree.steps, where)
        check_leaves(subtree.leaves, {step.node: step for step in subtree.steps}, where)
        if subtree.index == 0:
            self.prompt = subtree.prompt
        self.indices.add(subtree.index)
        self.steps.update((step.node, step) for step in subtree.steps)
        self.leaves.update((leaf.node, leaf) for leaf in subtree.leaves)
        return True

    def _check_place(self, subtree: Subtree, where: str) -> None:
        """The tree has begun, and the node that ``subtree`` hangs below goes on."""
        index, parent = subtree.index, subtree.parent
        if index == 0 and not len(subtree.prompt):
            raise TreeError(f"{where}: its first subtree lacks the prompt; subtree 0 carries it.", "prompt")
        if index and 0 not in self.indices:
            raise TreeError(f"{where}: subtree {index} came before subtree 0, which carries the prompt.", "prompt")
        if not subtree.steps:
            raise TreeError(f"{where}: subtree {index} is empty; a subtree has at least one step.", "steps")
        if parent != ROOT and parent not in self.steps:
            raise TreeError(f"{where}: subtree {index} hangs below unknown parent {parent}, which was not sent before.", "parent")
        if parent in self.leaves or (parent in self.steps and self.steps[parent].status.final):
            raise TreeError(f"{where}: subtree {index} hangs below node {parent}, where an episode ended or failed.", "parent")

    def _check_order(self, subtree: Subtree, where: str) -> None:
        """Node ids are new, and each step follows one of its own subtree's or the node it hangs below."""
        ended = {leaf.node for leaf in subtree.leaves}
        before: dict[int, Step] = {}
        for step in subtree.steps:
            node, parent = step.node, step.parent
            if node == ROOT or node in before or node in self.steps:
                raise TreeError(f"{where}, node {node} is there a second time; node ids are unique in a tree.", "node")
            if parent != subtree.parent and parent not in before:
                cycle = any(other.node == parent for other in subtree.steps)
                what = (
                    f"parent {parent} does not come before it (a cycle, or a wrong order)"
                    if cycle
                    else f"unknown parent {parent}"
                )
                raise TreeError(f"{where}, node {node}: {what}; parents come first.", "parent")
            if parent in before and (parent in ended or before[parent].status.final):
                raise TreeError(f"{where}, node {node}: parent {parent} is where an episode ended or failed.", "parent")
            before[node] = step

    def path(self, node: int) -> list[Step]:
        """The steps from the root down to ``node``."""
        steps: list[Step] = []
        while node != ROOT:
            steps.append(self.steps[node])
            node = steps[-1].parent
        return steps[::-1]

    def expandable(self) -> list[int]:
        """{root} ∪ nodes an episode can go on from, in id order: neither leaves nor failed."""
        inner = (n for n, s in self.steps.items() if n not in self.leaves and not s.status.final)
        return [ROOT, *sorted(inner)]

    @property
    def unique_tokens(self) -> int:
        """Tokens of the tree when each shared prefix counts once."""
        return len(self.prompt) + sum(step.length for step in self.steps.values())


@dataclass(slots=True, eq=False)
class Group:
    """All trees of one question: what an advantage is computed over."""

    id: str
    question: Question
    trees: dict[int, Tree] = field(default_factory=dict[int, Tree])

    def add(self, subtree: Subtree) -> bool:
        """Append a subtree to its tree; False if it was there already. Raises TreeError and changes nothing."""
        tree = self.trees.get(subtree.tree) or Tree()
        fresh = tree.add(subtree, self.id)
        self.trees[subtree.tree] = tree
        return fresh

    def depth(self, tree: int, node: int) -> int:
        """Steps from the root to ``node``; 0 where there is no such node."""
        known = self.trees.get(tree)
        return len(known.path(node)) if known is not None and node in known.steps else 0

    def leaves(self) -> Iterator[tuple[Tree, Leaf]]:
        """Every leaf with its tree, in (tree, node) order."""
        for index in sorted(self.trees):
            tree = self.trees[index]
            for node in sorted(tree.leaves):
                yield tree, tree.leaves[node]

    @property
    def unique_tokens(self) -> int:
        """Tokens of the group when each shared prefix counts once; its trees share their prompt."""
        prompts = [len(tree.prompt) for tree in self.trees.values()]
        return sum(tree.unique_tokens for tree in self.trees.values()) - sum(prompts) + max(prompts, default=0)

    @property
    def cost(self) -> Cost:
        return sum((step.cost for tree in self.trees.values() for step in tree.steps.values()), Cost())

    def needed(self) -> Cost:
        """What its trees need on an engine that forgets nothing and whose weights do not change.

        Every node's action is sampled once; what is read is computed once for each distinct prefix.
        """
        return _computed((tree, tree.steps.values()) for tree in self.trees.values())

    def chain_equivalent(self) -> Cost:
        """What independent chains to the same leaves would have computed, on an engine that also caches prefixes.

        Each leaf samples its own actions and makes its own tool calls. What is read (prompt, observations) is computed once
        for each distinct prefix, because a prefix cache serves chains too: chains of one question share its prompt, and
        those that began with the same words share what these found. Charging it once per chain would flatter the tree.
        """
        return _computed((tree, tree.path(leaf.node)) for tree, leaf in self.leaves())

    def spans(self) -> Iterator[VersionSpan]:
        for tree in self.trees.values():
            for step in tree.steps.values():
                yield from step.spans


def _computed(walks: Iterable[tuple[Tree, Iterable[Step]]]) -> Cost:
    """Every step of every walk samples its action and calls its tools; a prefix is read once, whoever meets it.

    Args:
        walks: steps of a tree, parents before their children.
    """
    read: dict[bytes, int] = {}
    cost = Cost()
    for tree, steps in walks:
        below = {ROOT: tree.prompt.tobytes()}
        read[below[ROOT]] = len(tree.prompt)
        for step in steps:
            below[step.node] = below[step.parent] + step.action.tobytes() + step.observation.tobytes()
            read[below[step.node]] = len(step.observation)
            cost += Cost(decoded=len(step.action), tool_calls=step.cost.tool_calls)
    return cost + Cost(prefilled=sum(read.values()))
