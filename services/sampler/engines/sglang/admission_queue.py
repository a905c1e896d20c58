"""Admission queue: which request gets the next free slot, and on which server. First come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from services.sampler.engines.sglang.prefix_router import PrefixRouter
from services.sampler.engines.sglang.server.server import SGLangServer
from treegrpo.core.step import TokenIds
from treegrpo.errors import EngineError


class AdmissionQueue:
    """The servers, and the requests that wait for a slot on one of them."""

    def __init__(self, servers: Sequence[SGLangServer]) -> None:
        self._servers = servers
        self.router = PrefixRouter[SGLangServer]()
        self._queue: deque[tuple[TokenIds, asyncio.Future[SGLangServer]]] = deque()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def acquire_slot(self, ids: TokenIds) -> SGLangServer:
        """Wait for a slot for a request with prefix ``ids``; end it with `release_slot`. Raises the error of `fail_waiting`."""
        future: asyncio.Future[SGLangServer] = asyncio.get_running_loop().create_future()
        entry = (ids, future)
        self._queue.append(entry)
        self.dispatch_waiting()
        try:
            return await future
        except asyncio.CancelledError:
            self._queue = deque(other for other in self._queue if other is not entry)
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release_slot(future.result())
            raise

    def release_slot(self, server: SGLangServer) -> None:
        """Free a slot of ``server`` and dispatch waiting requests."""
        server.slots_taken -= 1
        self.dispatch_waiting()

    def dispatch_waiting(self) -> None:
        """Assign free slots to waiting requests, in order. Call it whenever a slot may have become free."""
        while self._queue:
            ids, future = self._queue[0]
            usage = {server: server.slot_usage for server in self._servers if server.has_free_slot}
            server = self.router.choose_server(ids, usage)
            if server is None:
                return
            self._queue.popleft()
            if not future.done():
                server.slots_taken += 1
                self.router.record_prefix(ids, server)
                future.set_result(server)

    def fail_waiting(self, make_error: Callable[[], EngineError]) -> None:
        """Fail every waiting request with an error of its own, since raising an exception extends its traceback."""
        for _, future in self._queue:
            if not future.done():
                future.set_exception(make_error())
        self._queue.clear()
