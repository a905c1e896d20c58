"""Prefix-affinity routing: a request goes to the server that holds the longest beginning of its prefix.

Prefixes are remembered in blocks. A tree therefore stays with the server of its prompt. Only when that server is full does
a branch go elsewhere, and then its later turns, whose longest known beginning is there, follow it: whole branches move,
not single turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from services.sampler.engines.sglang.server.prefix_blocks import MAX_BLOCKS, block_keys
from treegrpo.core.step import TokenIds

ServerT = TypeVar("ServerT")


class PrefixRouter(Generic[ServerT]):
    """Remembers which servers computed which prefixes, in at most `MAX_BLOCKS` blocks."""

    def __init__(self) -> None:
        self._servers: OrderedDict[int, set[ServerT]] = OrderedDict()
        """By block key, the least recently used first."""

    def choose_server(self, ids: TokenIds, usage: Mapping[ServerT, float]) -> ServerT | None:
        """The server for a request with prefix ``ids``; None if there is none.

        Args:
            ids: the prefix.
            usage: the servers that have a free slot, and what share of their slots is taken.
        """
        if not usage:
            return None
        best: Sequence[ServerT] = list(usage)
        if len(usage) > 1:
            for key in block_keys(ids):
                if not (holding := [server for server in best if server in self._servers.get(key, ())]):
                    break
                best = holding
        return min(best, key=lambda server: usage[server])

    def record_prefix(self, ids: TokenIds, server: ServerT) -> None:
        """Note that ``server`` computes the keys and values of ``ids``."""
        for key in block_keys(ids):
            self._servers.setdefault(key, set()).add(server)
            self._servers.move_to_end(key)
        while len(self._servers) > MAX_BLOCKS:
            self._servers.popitem(last=False)
