"""The embedded engine's face: asyncio outside, one worker thread that computes inside.

Scheduler and event loop never run at the same time: what tasks want (a request, its cancellation, new weights) waits
as a command until the worker has finished its current step, and is then applied on the event loop. So neither side
needs a lock, and the loop stays free while torch computes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from prometheus_client import Metric

from services.sampler.engines.base import Completion, Counters, Sampling, check_request
from services.sampler.engines.embedded.model import Model
from services.sampler.engines.embedded.request import Request
from services.sampler.engines.embedded.scheduler import Scheduler
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.step import PolicyVersion, TokenIds
from treegrpo.errors import EngineError

log = logging.getLogger(__name__)


class EmbeddedEngine:
    """An `Engine` in this process. Make it with `open`, use it as an async context manager or call `close`."""

    def __init__(self, scheduler: Scheduler, threads: int) -> None:
        self._scheduler = scheduler
        self._worker = ThreadPoolExecutor(1, "embedded-engine", initializer=torch.set_num_threads, initargs=(threads,))
        self._commands: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self._interrupt = threading.Event()
        self._pending: dict[Request, asyncio.Future[Completion]] = {}
        self._swaps: set[asyncio.Future[None]] = set()
        self._loading = asyncio.Lock()
        self._failure = ""
        """Why no request can be served any more; empty while all is well."""
        self._driver = asyncio.create_task(self._drive(), name="embedded-engine")

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        max_running: int,
        max_context: int,
        cache_tokens: int,
        seed: int,
        threads: int = 1,
        version: PolicyVersion = PolicyVersion(),  # noqa: B008  # a frozen value
    ) -> Self:
        """Load the model directory ``path``.

        Args:
            path: a Hugging Face directory with config.json, safetensors and tokenizer.
            max_running: requests decoded together; more wait their turn.
            max_context: tokens a prefix and its completion may have together.
            cache_tokens: size of the prefix cache.
            seed: of what is sampled without one of its own.
            threads: torch threads for its computations.
            version: the policy version these weights are.

        Raises:
            ModelError: the directory cannot be used; the message says why.
        """
        model = await asyncio.to_thread(Model.open, path, max_context)
        tokenizer = await asyncio.to_thread(Tokenizer.open, path)
        tokenizer.check_fits(model.architecture.vocabulary, path)
        return cls(Scheduler(model, version, tokenizer, max_running=max_running, cache_tokens=cache_tokens, seed=seed), threads)

    @property
    def version(self) -> PolicyVersion:
        return self._scheduler.version

    @property
    def context(self) -> int:
        return self._scheduler.context

    @property
    def counters(self) -> Counters:
        """What the engine has done and holds now."""
        return self._scheduler.counters()

    @property
    def families(self) -> Mapping[str, Sequence[Metric]]:
        """None: it has no servers."""
        return {}

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: Sampling) -> Completion:
        """See `Engine.generate`."""
        request = Request(self._checked(prefix, sampling), sampling)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._pending[request] = future
        self._command(lambda: self._scheduler.submit(request))
        try:
            return await future
        finally:
            if self._pending.pop(request, None) is not None:
                self._command(lambda: self._scheduler.cancel(request))

    async def load(self, version: PolicyVersion, path: Path) -> None:
        """See `Engine.load`. The new weights are read and checked beside the running requests."""
        async with self._loading:
            model = await asyncio.to_thread(self._scheduler.model.reopen, path)
            await self._swap(model, version)

    async def _swap(self, model: Model, version: PolicyVersion) -> None:
        await self.health()
        swapped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def swap() -> None:
            self._scheduler.swap(model, version)
            if not swapped.done():
                swapped.set_result(None)

        self._swaps.add(swapped)
        self._command(swap)
        try:
            await swapped
        finally:
            self._swaps.discard(swapped)

    async def health(self) -> None:
        """See `Engine.health`."""
        if self._failure:
            raise EngineError(self._failure)

    async def close(self) -> None:
        """End the worker; whoever still waits gets an EngineError."""
        self._fail("The embedded engine is closed; open another one.")
        self._driver.cancel()
        self._interrupt.set()
        await asyncio.to_thread(self._worker.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _checked(self, prefix: Sequence[int] | TokenIds, sampling: Sampling) -> TokenIds:
        if self._failure:
            raise EngineError(self._failure)
        return check_request(prefix, sampling, self.context, self._scheduler.model.architecture.vocabulary)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._interrupt.set()
        self._wake.set()

    async def _drive(self) -> None:
        """Apply commands, let the worker run until something happens, deliver; for ever."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._commands or self._scheduler.busy:
                    self._interrupt.clear()
                    commands, self._commands = self._commands, []
                    for command in commands:
                        command()
                    for request in await loop.run_in_executor(self._worker, self._scheduler.run, self._interrupt):
                        self._deliver(request)
        except Exception as error:  # whatever it was, nobody may wait for ever
            log.exception("the embedded engine failed")
            self._fail(f"The embedded engine failed ({error!r}); restart the sampler.")

    def _deliver(self, request: Request) -> None:
        future = self._pending.pop(request, None)
        if future is not None and not future.done():
            future.set_result(request.completion())

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why
        for future in (*self._pending.values(), *self._swaps):
            if not future.done():
                future.set_exception(EngineError(self._failure))
        self._pending.clear()
