"""Random trees of known shape for the trainer, and their separate paths without shared tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from learner.trainer.algorithm.advantages import EstimatorOptions, advantages
from learner.trainer.algorithm.credit_assignment import CreditedTree, assign_credit, select_usable
from treegrpo.core.question import Question
from treegrpo.core.step import ROOT, Leaf, PolicyVersion, Step, Subtree, TokenIds, VersionSpan
from treegrpo.core.tree import Group, Tree

ACTION = (16, 25)
OBSERVATION = (30, 51)


@dataclass(frozen=True, slots=True)
class Shape:
    """How the trees of a question grow."""

    name: str
    trees: int
    expansions: int
    rounds: int
    turns: int = 4
    prompt: int = 80
    """Tokens."""
    from_depth: int = 0
    """Branches leave nodes at this depth or deeper."""


SHAPES = (
    Shape("(2,2,1)", 2, 2, 1),
    Shape("(4,4,2)", 4, 4, 2),
    Shape("deep", 1, 11, 1, turns=6, prompt=400, from_depth=4),
)


class TreeGenerator:
    """Grows trees with random tokens and rewards; branches leave nodes drawn uniformly, as the paper has it."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._vocabulary, self._rng = vocabulary, np.random.default_rng(seed)

    def group(self, shape: Shape, name: str) -> Group:
        group, prompt = Group(name, Question(name, "bench", (), ("",))), self._ids(shape.prompt)
        for tree in range(shape.trees):
            group.append_subtree(self._branch(shape, tree, 0, ROOT, 0, prompt))
            for round_ in range(shape.rounds):
                depth = _depths(group.trees[tree])
                open_nodes = [node for node in group.trees[tree].expandable() if depth[node] >= shape.from_depth]
                for n, node in enumerate(self._rng.choice(open_nodes, shape.expansions).tolist()):
                    index = 1 + round_ * shape.expansions + n
                    group.append_subtree(self._branch(shape, tree, index, node, depth[node], prompt[:0]))
        return group

    def _branch(self, shape: Shape, tree: int, index: int, parent: int, depth: int, prompt: TokenIds) -> Subtree:
        first = 1 + index * shape.turns
        steps: list[Step] = []
        for turn in range(depth, shape.turns):
            action = self._ids(int(self._rng.integers(*ACTION)))
            seen = self._ids(0 if turn == shape.turns - 1 else int(self._rng.integers(*OBSERVATION)))
            node = first + turn - depth
            logprobs = np.full(len(action), -np.log(self._vocabulary), np.float32)
            span = VersionSpan(PolicyVersion(), 0, len(action))
            steps.append(Step(node, steps[-1].node if steps else parent, action, logprobs, seen, (span,)))
        leaf = Leaf(steps[-1].node, {"reward": float(self._rng.integers(0, 2)) + 0.1 * float(self._rng.random())})
        return Subtree("bench", tree, index, parent, tuple(steps), (leaf,), prompt)

    def _ids(self, count: int) -> TokenIds:
        return self._rng.integers(0, self._vocabulary, count).astype(np.uint32)


def _depths(tree: Tree) -> dict[int, int]:
    depths = {ROOT: 0}
    for node, step in tree.steps.items():  # parents come first
        depths[node] = depths[step.parent] + 1
    return depths


def credited(groups: Sequence[Group]) -> list[CreditedTree]:
    batch = select_usable(groups)
    return assign_credit(batch, [advantages(one.tree_arrays, EstimatorOptions()) for one in batch], "leaf_mean")


def split_paths(trees: Sequence[CreditedTree]) -> list[CreditedTree]:
    """Every path as a tree of its own; a first token of its own keeps it from sharing anything."""
    made: list[CreditedTree] = []
    for one in trees:
        for leaf, given in one.credits.items():
            prompt = one.tree.prompt.copy()
            prompt[:2] = divmod(len(made), 256)
            path = {step.node: replace(step) for step in one.tree.path(leaf)}
            made.append(CreditedTree(Tree(prompt, path, {leaf: one.tree.leaves[leaf]}), {leaf: given}))
    return made
