"""Trees and groups: the steps of one question, assembled.

A *tree* grows from a prompt (its root, node 0). Each further *node* is one agent step (`treegrpo.core.step`). A *group* is
all trees of one question; its leaves are the episodes that are compared with each other.

Pure: no network, no clock, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from treegrpo.core.budget import Cost
from treegrpo.core.question import Question
from treegrpo.core.step import ROOT, Leaf, Step, Subtree, TokenIds, VersionSpan
from treegrpo.core.validation import check_leaves, check_steps, tree_label
from treegrpo.errors import TreeError


@dataclass(slots=True, eq=False)
class Tree:
    """All steps of one tree, by node id, and its leaves. Grows by `append_subtree`."""

    prompt: TokenIds = field(default_factory=lambda: np.zeros(0, np.uint32))
    steps: dict[int, Step] = field(default_factory=dict[int, Step])
    leaves: dict[int, Leaf] = field(default_factory=dict[int, Leaf])
    indices: set[int] = field(default_factory=set[int])

    def append_subtree(self, subtree: Subtree, group: str = "") -> bool:
        """Append a subtree; False if it was there already.

        Raises:
            TreeError: it does not fit or is not sound; nothing is changed. The sentence names ``group``, if given.
        """
        if subtree.index in self.indices:
            return False
        where = tree_label(subtree.lease, subtree.tree, group)
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
        """Check that the tree has a root, and that an episode can continue from the subtree's parent."""
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
        """Check that node ids are new, and that each step's parent is in the subtree or is the subtree's parent."""
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

    def append_subtree(self, subtree: Subtree) -> bool:
        """Append a subtree to its tree; False if it was there already. Raises TreeError and changes nothing."""
        tree = self.trees.get(subtree.tree) or Tree()
        fresh = tree.append_subtree(subtree, self.id)
        self.trees[subtree.tree] = tree
        return fresh

    def depths(self, subtree: Subtree) -> list[int]:
        """The depth of each step of ``subtree`` below the root; 0 if the subtree was not added."""
        tree = self.trees.get(subtree.tree)
        if tree is None or subtree.index not in tree.indices:
            return [0] * len(subtree.steps)
        depths = {subtree.parent: len(tree.path(subtree.parent))}
        for step in subtree.steps:  # parents come first
            depths[step.node] = depths[step.parent] + 1
        return [depths[step.node] for step in subtree.steps]

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
        return Cost.total(step.cost for tree in self.trees.values() for step in tree.steps.values())

    def needed(self) -> Cost:
        """The least cost of its trees: on an engine that caches every prefix and whose weights do not change.

        Every node's action is sampled once; what is read is computed once for each distinct prefix.
        """
        return _computed((tree, [tree.steps.values()]) for tree in self.trees.values())

    def chain_equivalent(self) -> Cost:
        """The cost of independent chains to the same leaves, on an engine that also caches prefixes.

        Each leaf samples its own actions and makes its own tool calls. What is read (prompt, observations) is computed once
        for each distinct prefix, because a prefix cache serves chains too: chains of one question share its prompt, and
        those that began with the same words share what these found. Charging it once per chain would flatter the tree.
        """
        return _computed((tree, map(tree.path, tree.leaves)) for tree in self.trees.values() if tree.leaves)

    def spans(self) -> Iterator[VersionSpan]:
        for tree in self.trees.values():
            for step in tree.steps.values():
                yield from step.spans


def _computed(trees: Iterable[tuple[Tree, Iterable[Iterable[Step]]]]) -> Cost:
    """The cost of walks: each step samples its action and calls its tools; a shared prefix is computed once.

    Args:
        trees: each with walks over its steps, parents before their children.
    """
    numbers: dict[tuple[int, bytes, bytes], int] = {}
    """The distinct prefixes, by the prefix that each extends, and how."""
    prefilled = decoded = tool_calls = 0
    for tree, walks in trees:
        prompt = (ROOT, tree.prompt.tobytes(), b"")
        if prompt not in numbers:
            prefilled += len(tree.prompt)
        at = {ROOT: numbers.setdefault(prompt, len(numbers) + 1)}
        for step in (step for walk in walks for step in walk):
            decoded += len(step.action)
            tool_calls += step.cost.tool_calls
            if step.node in at:
                continue
            prefix = (at[step.parent], step.action.tobytes(), step.observation.tobytes())
            if prefix not in numbers:
                prefilled += len(step.observation)
            at[step.node] = numbers.setdefault(prefix, len(numbers) + 1)
    return Cost(prefilled=prefilled, decoded=decoded, tool_calls=tool_calls)
