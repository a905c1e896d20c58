"""A radix tree from token ids to slots of a fixed pool: which prefixes have keys and values, and where.

Pure bookkeeping: it hands out slot numbers and never touches a tensor. A tree belongs to one policy version.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treegrpo.core.step import TokenIds

Slots = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Node:
    """An edge of the tree: ``ids`` below ``parent``, one slot each."""

    ids: TokenIds
    slots: Slots
    parent: _Node | None
    used: int = 0
    """The tree's clock when this node was last on a path; smallest is evicted first."""
    children: dict[int, _Node] = field(default_factory=dict[int, "_Node"])


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """How many leading ids ``a`` and ``b`` share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


class RadixTree:
    """Longest-prefix map over token ids with ``capacity`` slots and eviction of the least recently used leaves.

    Example:
        >>> tree = RadixTree(8)
        >>> tree.insert(np.array([5, 6, 7], np.uint32))
        (0, array([0, 1, 2]))
        >>> tree.match(np.array([5, 6, 9], np.uint32))
        array([0, 1])
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evicted = 0
        """Tokens evicted so far."""
        self._root = _Node(np.zeros(0, np.uint32), np.zeros(0, np.int64), None)
        self._free = np.arange(capacity, dtype=np.int64)
        self._clock = 0
        self._leaves: list[tuple[int, int, _Node]] = []
        self._pushed = 0

    @property
    def used(self) -> int:
        """Slots that hold a token."""
        return self.capacity - len(self._free)

    def match(self, ids: TokenIds) -> Slots:
        """[m] slots of the longest stored prefix of ``ids``, token by token; marks whole edges on it as used now."""
        return self._walk(ids)[2]

    def insert(self, ids: TokenIds) -> tuple[int, Slots]:
        """Store ``ids``; returns (start, slots): the caller fills slots with the tokens from ``start`` on.

        Stored tokens keep their slots. If eviction does not free enough slots, only the part that fits is stored.
        """
        node, into, stored = self._walk(ids)
        start = len(stored)
        if into < len(node.ids):
            node = self._split(node, into)
        self._evict(len(ids) - start - len(self._free), keep=node)
        size = min(len(ids) - start, len(self._free))
        if size == 0:
            return start, self._free[:0]
        slots, self._free = self._free[:size], self._free[size:]
        leaf = _Node(ids[start : start + size].copy(), slots, node, self._clock)
        node.children[int(leaf.ids[0])] = leaf
        self._push(leaf)
        return start, slots

    def _walk(self, ids: TokenIds) -> tuple[_Node, int, Slots]:
        """(deepest node that ``ids`` reach, how far into its edge, all slots on the way)."""
        self._clock += 1
        node, into, found = self._root, 0, [self._root.slots]
        depth = 0
        while depth < len(ids) and (child := node.children.get(int(ids[depth]))):
            node, into = child, common_prefix(child.ids, ids[depth:])
            found.append(child.slots[:into])
            depth += into
            if into < len(child.ids):
                break
            child.used = self._clock
        return node, into, np.concatenate(found)

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut ``node``'s edge in two; returns the new upper half. Slots stay where they are."""
        parent = node.parent
        assert parent is not None  # noqa: S101  # the root's edge is empty, no path ends inside it
        upper = _Node(node.ids[:at], node.slots[:at], parent, self._clock)
        parent.children[int(upper.ids[0])] = upper
        node.ids, node.slots, node.parent = node.ids[at:], node.slots[at:], upper
        upper.children[int(node.ids[0])] = node
        return upper

    def _push(self, leaf: _Node) -> None:
        self._pushed += 1
        heapq.heappush(self._leaves, (leaf.used, self._pushed, leaf))

    def _evict(self, needed: int, keep: _Node) -> None:
        """Free at least ``needed`` slots if leaves other than ``keep`` hold as many.

        The heap is lazy: an entry whose node is gone or became inner is dropped, one used since is put back.
        """
        kept = False
        while needed > 0 and self._leaves:
            used, _, leaf = heapq.heappop(self._leaves)
            parent = leaf.parent
            if parent is None or leaf.children:
                continue
            if leaf is keep:
                kept = True
            elif leaf.used != used:
                self._push(leaf)
            else:
                needed -= len(leaf.ids)
                self._remove(leaf, parent)
        if kept:
            self._push(keep)

    def _remove(self, leaf: _Node, parent: _Node) -> None:
        del parent.children[int(leaf.ids[0])]
        leaf.parent = None
        self.evicted += len(leaf.ids)
        # Sorted, so that tokens which follow each other mostly lie side by side and are copied in few runs.
        self._free = np.sort(np.concatenate((self._free, leaf.slots)))
        if not parent.children and parent.parent is not None:
            self._push(parent)
