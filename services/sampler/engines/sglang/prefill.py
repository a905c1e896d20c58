"""Siblings wait for each other: what one request is about to compute, another does not compute beside it.

A server reuses what is in its cache, not what another request of the same batch computes. So a request waits until those
before it that share a part of its prefix, which the server has not computed yet, have their first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from services.sampler.engines.sglang.routing import REMEMBERED, block_keys
from treegrpo.step import TokenIds


class Prefills:
    """Which blocks a server has computed, and which it computes now."""

    def __init__(self) -> None:
        self._computed: set[int] = set()
        self._now: dict[int, asyncio.Event] = {}

    @asynccontextmanager
    async def turn(self, ids: TokenIds) -> AsyncGenerator[Callable[[], None]]:
        """Wait for the turn of a request with prefix ``ids``; call what this yields when the prefix is computed."""
        keys = list(block_keys(ids))
        while (ahead := next((self._now[key] for key in keys if key in self._now), None)) is not None:
            await ahead.wait()
        mine, first = [key for key in keys if key not in self._computed], asyncio.Event()
        self._now |= dict.fromkeys(mine, first)

        def leave() -> None:
            for key in mine:
                if self._now.get(key) is first:
                    del self._now[key]
            first.set()

        def computed() -> None:
            self._keep(mine)
            leave()

        try:
            yield computed
        finally:
            leave()

    def remember(self, ids: TokenIds) -> None:
        """The server has computed ``ids``."""
        self._keep(list(block_keys(ids)))

    def _keep(self, keys: list[int]) -> None:
        """That the server may evict some of these blocks costs a computation, no more."""
        if len(self._computed) + len(keys) > REMEMBERED:
            self._computed.clear()
        self._computed.update(keys)

    def forget(self) -> None:
        """The cache is empty."""
        self._computed.clear()
