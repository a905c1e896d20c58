"""Siblings wait for each other: what one request is about to compute, another does not compute beside it.

A server reuses what is in its cache, not what another request of the same batch computes. So a request waits until those
before it that share a part of its prefix, which the server has not computed yet, have their first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from services.sampler.engines.sglang.prefix_router import REMEMBERED, block_keys
from treegrpo.core.step import TokenIds

SETTLE_TURNS = 4
"""Of the event loop: within these, requests that begin together have all come."""
LATE_SECONDS = 0.1
"""The longest that one who comes later waits: by then the server has most likely begun."""


class Turn:
    """A request's time at a server, and the blocks that it is the first to need."""

    def __init__(self, keys: list[int]) -> None:
        self.keys = keys
        self.over = asyncio.Event()
        """They are computed, or will not be."""
        self.awaited = False
        """Others wait for that, so it is worth while to be told when."""
        self.asked = False
        """The server has the request: it is too late to ask to be told."""


class Prefills:
    """Which blocks a server has computed, and which it computes now."""

    def __init__(self) -> None:
        self._computed: set[int] = set()
        self._now: dict[int, Turn] = {}

    @asynccontextmanager
    async def turn(self, ids: TokenIds) -> AsyncGenerator[Turn]:
        """Wait for the turn of a request with prefix ``ids``; then others wait for it, until `computed` or the block's end."""
        keys = list(block_keys(ids))
        waited: set[Turn] = set()
        while ahead := next((turn for key in keys if (turn := self._now.get(key)) and turn not in waited), None):
            waited.add(ahead)
            ahead.awaited = True
            with suppress(TimeoutError):
                async with asyncio.timeout(LATE_SECONDS if ahead.asked else None):
                    await ahead.over.wait()
        turn = Turn([key for key in keys if key not in self._computed and key not in self._now])
        self._now |= dict.fromkeys(turn.keys, turn)
        try:
            for _ in range(SETTLE_TURNS if turn.keys else 0):
                await asyncio.sleep(0)
            turn.asked = True
            yield turn
        finally:
            self._end(turn)

    def computed(self, turn: Turn) -> None:
        """Its first token is there."""
        self._keep(turn.keys)
        self._end(turn)

    def remember(self, ids: TokenIds) -> None:
        """The server has computed ``ids``."""
        self._keep(list(block_keys(ids)))

    def forget(self) -> None:
        """The cache is empty."""
        self._computed.clear()

    def _keep(self, keys: list[int]) -> None:
        """That the server may evict some of these blocks costs a computation, no more."""
        if len(self._computed) + len(keys) > REMEMBERED:
            self._computed.clear()
        self._computed.update(keys)

    def _end(self, turn: Turn) -> None:
        for key in turn.keys:
            if self._now.get(key) is turn:
                del self._now[key]
        turn.over.set()
