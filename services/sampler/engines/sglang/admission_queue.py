"""Places on the servers: who gets the next one, and where. First come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from services.sampler.engines.sglang.prefix_router import Router
from services.sampler.engines.sglang.server import Server
from treegrpo.core.step import TokenIds
from treegrpo.errors import EngineError


class Floor:
    """The servers, and the requests that wait for a place on one."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self.router = Router[Server]()
        self._queue: deque[tuple[TokenIds, asyncio.Future[Server]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self, ids: TokenIds) -> Server:
        """A place for a request with prefix ``ids``; give it back with `leave`. Raises the error of `fail`."""
        future: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        entry = (ids, future)
        self._queue.append(entry)
        self.serve()
        try:
            return await future
        except asyncio.CancelledError:
            self._queue = deque(other for other in self._queue if other is not entry)
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(future.result())
            raise

    def leave(self, server: Server) -> None:
        server.taken -= 1
        self.serve()

    def serve(self) -> None:
        """Give places to those who wait, as far as there are any. Call it whenever one may have become free."""
        while self._queue:
            ids, future = self._queue[0]
            server = self.router.choose(ids, {server: server.fullness for server in self._servers if server.has_room})
            if server is None:
                return
            self._queue.popleft()
            if not future.done():
                server.taken += 1
                self.router.remember(ids, server)
                future.set_result(server)

    def fail(self, error: Callable[[], EngineError]) -> None:
        """Send away those who wait, each with an ``error`` of its own: whoever raises one adds to its traceback."""
        for _, future in self._queue:
            if not future.done():
                future.set_exception(error())
        self._queue.clear()
