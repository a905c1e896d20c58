"""Which server a request goes to: the one that holds the longest beginning of its prefix.

Prefixes are remembered in blocks; a block's key stands for all tokens up to its end. A tree therefore stays with the
server of its prompt. Only when that server is full does a branch go elsewhere, and then its later turns, whose longest
known beginning is there, follow it: whole branches move, not single turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from treegrpo.core.step import TokenIds

BLOCK = 8
REMEMBERED = 1 << 17
"""Blocks: a million tokens, 30 MB."""

Place = TypeVar("Place")


class Router(Generic[Place]):
    """Remembers where prefixes went."""

    def __init__(self) -> None:
        self._holders: OrderedDict[int, set[Place]] = OrderedDict()

    def choose(self, ids: TokenIds, places: Mapping[Place, float]) -> Place | None:
        """The best of ``places``, which have room now; their value is how full they are. None if there is none."""
        if not places:
            return None
        best: Sequence[Place] = list(places)
        if len(places) > 1:
            for key in block_keys(ids):
                if not (held := [place for place in best if place in self._holders.get(key, ())]):
                    break
                best = held
        return min(best, key=lambda place: places[place])

    def remember(self, ids: TokenIds, place: Place) -> None:
        """``place`` computes the keys and values of ``ids``."""
        for key in block_keys(ids):
            self._holders.setdefault(key, set()).add(place)
            self._holders.move_to_end(key)
        while len(self._holders) > REMEMBERED:
            self._holders.popitem(last=False)


def block_keys(ids: TokenIds) -> Iterator[int]:
    """One key for each whole block, of everything up to its end."""
    key, raw = 0, np.ascontiguousarray(ids, np.uint32).tobytes()
    for end in range(BLOCK * 4, len(raw) + 1, BLOCK * 4):
        key = hash((key, raw[end - BLOCK * 4 : end]))
        yield key
