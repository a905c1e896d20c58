"""Prefill deduplication: a request waits while another one computes a part of its prefix.

A server reuses what is in its cache, not what another request of the same batch computes. So a request waits until those
before it that share a part of its prefix, which the server has not computed yet, have their first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from services.sampler.engines.sglang.server.prefix_blocks import MAX_BLOCKS, block_keys
from treegrpo.core.step import TokenIds

SETTLE_TICKS = 4
"""Ticks of the event loop within which all requests that start together have arrived."""
LATE_SECONDS = 0.1
"""The longest that a late request waits: by then the server has most likely begun."""


class Prefill:
    """A request that is being prefilled, and the blocks that it is the first to need."""

    def __init__(self, keys: list[int]) -> None:
        self.keys = keys
        self.finished = asyncio.Event()
        """Its blocks are computed, or will not be."""
        self.awaited = False
        """Other requests wait for it, so its first token has to be reported."""
        self.sent = False
        """The server has the request: it is too late to request a report of its first token."""


class PrefillDedup:
    """Which blocks a server has computed, and which it is computing."""

    def __init__(self) -> None:
        self._computed: set[int] = set()
        self._running: dict[int, Prefill] = {}

    @asynccontextmanager
    async def reserve_prefill(self, ids: TokenIds) -> AsyncGenerator[Prefill]:
        """Wait until no other request computes blocks of ``ids``; others then wait for this one.

        They wait until `mark_computed` or the end of the block.
        """
        keys = list(block_keys(ids))
        waited: set[Prefill] = set()
        while ahead := next((other for key in keys if (other := self._running.get(key)) and other not in waited), None):
            waited.add(ahead)
            ahead.awaited = True
            with suppress(TimeoutError):
                async with asyncio.timeout(LATE_SECONDS if ahead.sent else None):
                    await ahead.finished.wait()
        prefill = Prefill([key for key in keys if key not in self._computed and key not in self._running])
        self._running |= dict.fromkeys(prefill.keys, prefill)
        try:
            for _ in range(SETTLE_TICKS if prefill.keys else 0):
                await asyncio.sleep(0)
            prefill.sent = True
            yield prefill
        finally:
            self._finish(prefill)

    def mark_computed(self, prefill: Prefill) -> None:
        """Note that the first token of ``prefill`` arrived, so its blocks are computed."""
        self._remember(prefill.keys)
        self._finish(prefill)

    def record_computed(self, ids: TokenIds) -> None:
        """Note that the server has computed ``ids``."""
        self._remember(list(block_keys(ids)))

    def clear_computed(self) -> None:
        """Note that the server's cache is empty."""
        self._computed.clear()

    def _remember(self, keys: list[int]) -> None:
        """Store block keys. If the server evicts a block, it is only computed again."""
        if len(self._computed) + len(keys) > MAX_BLOCKS:
            self._computed.clear()
        self._computed.update(keys)

    def _finish(self, prefill: Prefill) -> None:
        for key in prefill.keys:
            if self._running.get(key) is prefill:
                del self._running[key]
        prefill.finished.set()
