"""Layout of a pack: paths depth first, every shared prefix once, and which tokens see which.

Sorted paths make a tree without one being built: what a path shares with the one before it is already there, so a path
adds a *run* of new tokens, and its prefix is a few stretches of earlier runs. In this order everything below a token is
one range that follows it, and so two rules define all of attention:

    a run sees itself, causally
    a *cross* is a stretch of an earlier run with the range of tokens below its end, which see all of it

    paths      a b c d          pack      a b c d e f g        runs       [0,4) [4,6) [6,7)
               a b e f                    ─────── ─── ─        crosses    queries [4,6) see [0,2)
               a g                                                        queries [6,7) see [0,1)

Shapes: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PathIds = NDArray[np.uint32]
"""Token ids from the first to the last that is an input."""
Range = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The tokens of a pack, and which of them see which."""

    runs: tuple[Range, ...]
    """Where the new tokens of each path lie that has any and that does not just go on; together they are [0, T)."""
    crosses: tuple[tuple[Range, Range], ...]
    """(queries, keys): all of these queries see all of these keys."""
    ids_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    """Depth on the path: the position a lone path would give the token."""
    end_T: NDArray[np.int64]
    """Token j is seen by exactly the tokens of [j, end_T[j])."""

    @property
    def tokens(self) -> int:
        return len(self.position_T)

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs see each other: what attention costs."""
        return int((self.end_T - np.arange(self.tokens)).sum())


def shared_prefix(one: PathIds, other: PathIds) -> int:
    """Tokens that two paths have in common from the start."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def lay_out(paths: Sequence[PathIds], prefixes: Sequence[int]) -> tuple[Layout, list[NDArray[np.int64]]]:
    """Lay out sorted paths.

    Args:
        paths: in lexicographic order, none empty.
        prefixes: for each path how many tokens it takes from the one before; 0 for the first.

    Returns:
        The layout, and for each path where its tokens lie in the pack.
    """
    places: list[NDArray[np.int64]] = []
    runs: list[Range] = []
    crosses: dict[Range, Range] = {}
    start, before = 0, np.zeros(0, np.int64)
    for path, prefix in zip(paths, prefixes, strict=True):
        end = start + len(path) - prefix
        if start < end:
            goes_on = bool(runs) and prefix == len(before)  # the path before ended on the way: one run, not two
            first = runs.pop()[0] if goes_on else start
            runs.append((first, end))
            for keys in _stretches(before[:prefix]):
                if keys[0] != first:
                    crosses[keys] = (crosses.get(keys, (start, end))[0], end)
        before = np.concatenate([before[:prefix], np.arange(start, end)])
        places.append(before)
        start = end
    ids_T, position_T, end_T = (np.zeros(start, np.int64) for _ in range(3))
    for path, place in zip(paths, places, strict=True):
        ids_T[place], position_T[place] = path, np.arange(len(place))
    for first, last in runs:
        end_T[first:last] = last
    for (first, last), (_, end) in crosses.items():
        end_T[first:last] = np.maximum(end_T[first:last], end)
    seen = tuple((queries, keys) for keys, queries in crosses.items())
    return Layout(tuple(runs), seen, ids_T, position_T, end_T), places


def _stretches(place: NDArray[np.int64]) -> list[Range]:
    """The ranges of consecutive numbers in an ascending array."""
    if not len(place):
        return []
    cuts = np.flatnonzero(np.diff(place) > 1) + 1
    firsts, lasts = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(place)]])
    return [(int(place[a]), int(place[b - 1]) + 1) for a, b in zip(firsts, lasts, strict=True)]
