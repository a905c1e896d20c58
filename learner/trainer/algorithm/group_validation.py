"""Group validation: refuses groups that cannot be trained on before they become tensors.

    bytes ─► unpack_group ─► check_group ─► valid groups ─► select_usable ─► …
                 └───────────────┴─────► refused: one message each, to be logged and counted

The intake has checked every subtree it accepted; a journal may come from elsewhere, and the model may be another.
"""

from __future__ import annotations

from collections.abc import Sequence

from treegrpo.core.step import ROOT
from treegrpo.core.tree import Group, Tree
from treegrpo.core.validation import check_leaves, check_steps, check_vocabulary
from treegrpo.errors import ContractError, TreeError
from treegrpo.wire.trainer_protocol import unpack_group


def unpack_groups(packed: Sequence[bytes], vocabulary: int) -> tuple[list[Group], list[str]]:
    """The valid groups of a `Taken`, for a model of ``vocabulary`` ids, and the errors of the invalid ones."""
    groups, refused = list[Group](), list[str]()
    for data in packed:
        try:
            group = unpack_group(data)
            check_group(group, vocabulary)
        except ContractError as error:  # an invalid group must not stop the run
            refused.append(str(error))
        else:
            groups.append(group)
    return groups, refused


def check_group(group: Group, vocabulary: int) -> None:
    """Raise TreeError if ``group`` cannot be trained on; the message names group, tree, node and field."""
    for index, tree in sorted(group.trees.items()):
        where = f"Group {group.id}, tree {index}"
        if not len(tree.prompt):
            raise TreeError(f"{where}: it has no prompt, so nothing predicts its first token.", "prompt")
        if not tree.steps:
            raise TreeError(f"{where}: it is empty; a tree has at least one step.", "steps")
        _check_links(tree, where)
        steps = list(tree.steps.values())
        check_steps(steps, where)
        check_leaves(list(tree.leaves.values()), tree.steps, where)
        check_vocabulary(tree.prompt, steps, vocabulary, where)


def _check_links(tree: Tree, where: str) -> None:
    """Check that every node leads up to the root, over nodes at which no episode ended. No recursion: a chain may be long."""
    for node, step in tree.steps.items():
        if node == ROOT or node != step.node:
            raise TreeError(f"{where}, node {node}: its step says it is node {step.node}; node 0 is the root.", "node")
        parent = tree.steps.get(step.parent)
        if parent is None and step.parent != ROOT:
            raise TreeError(f"{where}, node {node}: unknown parent {step.parent}.", "parent")
        if step.parent in tree.leaves or (parent is not None and parent.status.final):
            raise TreeError(f"{where}, node {node}: parent {step.parent} is where an episode ended or failed.", "parent")
    for node, leaf in tree.leaves.items():
        if node != leaf.node:
            raise TreeError(f"{where}, node {node}: its leaf says it ends node {leaf.node}.", "leaf")
    reached = {ROOT}
    for first in tree.steps:
        node, walk = first, set[int]()
        while node not in reached:
            if node in walk:
                raise TreeError(f"{where}, node {node}: its parents lead back to it, which is a cycle.", "parent")
            walk.add(node)
            node = tree.steps[node].parent
        reached |= walk
