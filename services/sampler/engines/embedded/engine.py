"""The embedded engine: an asyncio interface to the scheduler, which one worker thread runs.

Scheduler and event loop never touch the state at the same time: a request, its cancellation or new weights wait as a
command until the worker has finished its current step, and are then applied on the event loop. So neither side needs a
lock, and the loop stays free while torch computes.
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

from services.sampler.engines.base import Completion, EngineCounters, SamplingParams, check_request
from services.sampler.engines.embedded.model import EmbeddedModel
from services.sampler.engines.embedded.scheduler import Request, Scheduler
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.step import PolicyVersion, TokenIds
from treegrpo.errors import EngineError

log = logging.getLogger(__name__)


class EmbeddedEngine:
    """An `Engine` in this process. Make it with `from_directory`, use it as an async context manager or call `close_engine`."""

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
        """Why no request can be served any more; empty while the engine works."""
        self._loop_task = asyncio.create_task(self._run_loop(), name="embedded-engine")

    @classmethod
    async def from_directory(
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
        model = await asyncio.to_thread(EmbeddedModel.read_directory, path, max_context)
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
    def counters(self) -> EngineCounters:
        """What the engine has done and holds now."""
        return self._scheduler.counters()

    @property
    def server_metrics(self) -> Mapping[str, Sequence[Metric]]:
        """None, since it has no servers."""
        return {}

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> Completion:
        """See `Engine.generate`."""
        request = Request(self._check_request(prefix, sampling), sampling)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._pending[request] = future
        self._enqueue(lambda: self._scheduler.submit(request))
        try:
            return await future
        finally:
            if self._pending.pop(request, None) is not None:
                self._enqueue(lambda: self._scheduler.cancel(request))

    async def load_weights(self, version: PolicyVersion, path: Path) -> None:
        """See `Engine.load_weights`. The new weights are read and checked while requests run."""
        async with self._loading:
            model = await asyncio.to_thread(self._scheduler.model.with_weights, path)
            await self._swap(model, version)

    async def _swap(self, model: EmbeddedModel, version: PolicyVersion) -> None:
        await self.check_health()
        swapped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def swap() -> None:
            self._scheduler.swap_weights(model, version)
            if not swapped.done():
                swapped.set_result(None)

        self._swaps.add(swapped)
        self._enqueue(swap)
        try:
            await swapped
        finally:
            self._swaps.discard(swapped)

    async def check_health(self) -> None:
        """See `Engine.check_health`."""
        if self._failure:
            raise EngineError(self._failure)

    async def close_engine(self) -> None:
        """End the worker; waiting requests fail with an EngineError."""
        self._fail("The embedded engine is closed; open another one.")
        self._loop_task.cancel()
        self._interrupt.set()
        await asyncio.to_thread(self._worker.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_engine()

    def _check_request(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> TokenIds:
        if self._failure:
            raise EngineError(self._failure)
        return check_request(prefix, sampling, self.context, self._scheduler.model.architecture.vocabulary)

    def _enqueue(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._interrupt.set()
        self._wake.set()

    async def _run_loop(self) -> None:
        """Event loop of the engine: apply commands, run the worker until a request finishes or a command arrives, deliver."""
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
                    for request in await loop.run_in_executor(self._worker, self._scheduler.run_steps, self._interrupt):
                        self._deliver(request)
        except Exception as error:  # whatever it was, no request may wait for ever
            log.exception("the embedded engine failed")
            self._fail(f"The embedded engine failed ({error!r}); restart the sampler.")

    def _deliver(self, request: Request) -> None:
        future = self._pending.pop(request, None)
        if future is not None and not future.done():
            future.set_result(request.completion())

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        for future in (*self._pending.values(), *self._swaps):
            if not future.done():
                future.set_exception(EngineError(self._failure))
        self._pending.clear()
