"""Memory for keys and values: one contiguous row per running request, and the pool of the prefix cache.

Both are [layers, 2 (key, value), …, head_dim], so that a run of tokens is copied between them as one strided block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from services.sampler.engines.embedded.architecture import Architecture
from services.sampler.engines.embedded.radix import Slots
from treegrpo.errors import ConfigError
from treegrpo.runtime.machine_memory import GIB, memory_limit


def check_kv_memory(architecture: Architecture, rows: int, context: int, slots: int) -> int:
    """The bytes that `KvMemory` takes.

    Raises:
        ConfigError: they are more than the machine has, or this process's control group may use.
    """
    limit, token = memory_limit(), token_bytes(architecture)
    needed = token * (rows * context + slots)
    if needed > limit:
        fits = max(0, limit // token - slots) // context
        remedy = f"lower engine.max_running to at most {fits}" if fits else "lower rollout.max_context or engine.cache_tokens"
        raise ConfigError(
            f"engine.max_running = {rows} generations of rollout.max_context = {context} tokens and engine.cache_tokens = "
            f"{slots} need {needed / GIB:.1f} GiB of memory, and there are {limit / GIB:.1f} GiB; {remedy}."
        )
    return needed


def token_bytes(architecture: Architecture) -> int:
    """Bytes of the keys and values of one token."""
    return architecture.layers * 2 * architecture.kv_heads * architecture.head_dim * torch.float32.itemsize


class KvMemory:
    """Rows [layers, 2, rows, kv_heads, context, head_dim] and pool [layers, 2, kv_heads, slots, head_dim], float32."""

    def __init__(self, architecture: Architecture, rows: int, context: int, slots: int) -> None:
        check_kv_memory(architecture, rows, context, slots)
        a = architecture
        self.rows = torch.zeros(a.layers, 2, rows, a.kv_heads, context, a.head_dim)
        self.pool = torch.zeros(a.layers, 2, a.kv_heads, slots, a.head_dim)

    def load_prefix(self, row: int, slots: Slots) -> None:
        """Copy pool ``slots`` to the first positions of ``row``."""
        for at, first, size in _runs(slots):
            self.rows[:, :, row, :, at : at + size] = self.pool[:, :, :, first : first + size]

    def store_prefix(self, row: int, start: int, slots: Slots) -> None:
        """Copy the positions of ``row`` from ``start`` on to pool ``slots``."""
        for at, first, size in _runs(slots):
            self.pool[:, :, :, first : first + size] = self.rows[:, :, row, :, start + at : start + at + size]

    def move_row(self, source: int, target: int, length: int) -> None:
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
