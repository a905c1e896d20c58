"""Where keys and values lie: one contiguous row per running request, and the pool of the prefix cache.

Both are [layers, 2 (key, value), …, head_dim], so that a run of tokens is copied between them as one strided block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from services.sampler.engines.embedded.architecture import Architecture
from services.sampler.engines.embedded.radix import Slots


class Memory:
    """Rows [layers, 2, rows, kv_heads, context, head_dim] and pool [layers, 2, kv_heads, slots, head_dim], float32."""

    def __init__(self, architecture: Architecture, rows: int, context: int, slots: int) -> None:
        a = architecture
        self.rows = torch.zeros(a.layers, 2, rows, a.kv_heads, context, a.head_dim)
        self.pool = torch.zeros(a.layers, 2, a.kv_heads, slots, a.head_dim)

    def load(self, row: int, slots: Slots) -> None:
        """Copy pool ``slots`` to the first positions of ``row``."""
        for at, first, size in _runs(slots):
            self.rows[:, :, row, :, at : at + size] = self.pool[:, :, :, first : first + size]

    def store(self, row: int, start: int, slots: Slots) -> None:
        """Copy the positions of ``row`` from ``start`` on to pool ``slots``."""
        for at, first, size in _runs(slots):
            self.pool[:, :, :, first : first + size] = self.rows[:, :, row, :, start + at : start + at + size]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of row ``source`` to row ``target``."""
        self.rows[:, :, target, :, :length] = self.rows[:, :, source, :, :length]


def _runs(slots: Slots) -> Iterator[tuple[int, int, int]]:
    """Cut ``slots`` into runs of consecutive numbers: (index of the first, its slot, length)."""
    if len(slots) == 0:
        return
    ends = [*(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    start = 0
    for end in ends:
        yield start, int(slots[start]), end - start
        start = end
