"""The engine that lives in SGLang servers: asks them, looks after them, gives them new weights.

generate() ─► floor: a place, by prefix ─► server ─► /generate ─► draft ─► stop? full? ─► completion
▲                                                   │
└──────── failed, aborted, stopped too early ───────┘   what has been sampled is kept
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from prometheus_client import Metric

from services.sampler.engines.base import Completion, Counters, Sampling, check_request
from services.sampler.engines.sglang.admission_queue import Floor
from services.sampler.engines.sglang.api.responses import Answer
from services.sampler.engines.sglang.pending_generation import Draft
from services.sampler.engines.sglang.server import Server
from services.sampler.engines.sglang.supervision import Keeper, keep_remote
from services.sampler.engines.sglang.weight_staging import Stage, Staged
from services.sampler.engines.stop_strings import StopStrings
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.step import PolicyVersion, TokenIds
from treegrpo.errors import (
    ContractError,
    DeadlineError,
    EngineAwayError,
    EngineError,
    TreeGrpoError,
    UnavailableError,
    WeightsError,
)

log = logging.getLogger(__name__)
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0)
"""Waits before a request that failed is made again; the count begins anew with every token that comes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests must keep to."""

    context: int
    """Tokens a prefix and its completion may have together."""
    vocabulary: int


class SGLangEngine:
    """An `Engine` on one or several servers. `factory.py` makes it; use it as an async context manager or call `close`."""

    def __init__(
        self, servers: Sequence[Server], keeper: Keeper | None, stage: Stage, served: Staged, tokenizer: Tokenizer, limits: Limits
    ) -> None:
        """Args:
        servers: those that serve ``served`` are up.
        keeper: runs the one server as a child; None: others run them.
        stage: where versions are put for the servers, closed with the engine.
        served: what the servers serve now.
        tokenizer: the model's.
        limits: of every request.
        """
        self.servers = servers
        self._floor = Floor(servers)
        self.keeper = keeper
        self.stage = stage
        self._served = served
        self._limits = limits
        self._stops = StopStrings(tokenizer)
        self._eos = tokenizer.eos
        self._totals = Counters()
        self._errors: Counter[str] = Counter()
        self._loading = asyncio.Lock()
        self._arrived = asyncio.Event()
        """Set when a server has come up since it was cleared."""
        self._failure = ""
        """Why no request can be served any more; empty while all is well."""
        self._tasks = [asyncio.create_task(self._guard(keep), name="sglang-keep") for keep in self._keeping()]
        self._kept = len(self._tasks)
        """Servers that are not given up."""

    @property
    def version(self) -> PolicyVersion:
        return self._served.version

    @property
    def context(self) -> int:
        return self._limits.context

    @property
    def counters(self) -> Counters:
        """What the engine has done and holds now."""
        loads = [server.load for server in self.servers if server.load is not None]
        return Counters(
            prefilled=self._totals.prefilled,
            cached=self._totals.cached,
            decoded=self._totals.decoded,
            running=sum(load.running for load in loads),
            waiting=self._floor.waiting + sum(load.queued for load in loads),
            limit=sum(server.pressure.limit for server in self.servers if server.up),
            cache_tokens=sum(load.used for load in loads),
            cache_capacity=sum(load.capacity for load in loads),
            stalled=sum(server.stalled for server in self.servers),
            restarts=self.keeper.restarts if self.keeper else 0,
            errors=dict(self._errors),
        )

    @property
    def families(self) -> Mapping[str, Sequence[Metric]]:
        """What its servers say to Prometheus, by URL."""
        return {server.api.url: server.families for server in self.servers}

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: Sampling) -> Completion:
        """See `Engine.generate`. A failure is tried again here, for about twenty seconds.

        Raises EngineAwayError as soon as no server is up.
        """
        ids = self._checked(prefix, sampling)
        draft = Draft(ids, sampling, min(sampling.max_tokens, self.context - len(ids)), self._stops, self._eos)
        failures, sampled = 0, 0
        while draft.finish is None:
            try:
                await self._go_on(draft)
            except EngineAwayError:
                raise
            except (UnavailableError, DeadlineError, ContractError, EngineError) as error:
                self._count(error)
                if not self._up:
                    raise self._away() from error
                if failures == len(RETRY_SECONDS):
                    raise EngineError(f"{error} It has been tried {failures + 1} times.") from error
                await asyncio.sleep(RETRY_SECONDS[failures])
                failures += 1
            if len(draft.ids) > sampled:
                failures, sampled = 0, len(draft.ids)
        return draft.completion()

    async def load(self, version: PolicyVersion, path: Path) -> None:
        """See `Engine.load`. The files are checked and put into memory beside the running requests.

        Raises UnavailableError when no server could be told; it is then safe to try again.
        """
        async with self._loading:
            if version == self.version:
                return
            new = await asyncio.to_thread(self.stage.put, version, path)
            try:
                await self._swap(new)
            except BaseException:
                await asyncio.to_thread(self.stage.drop, new)
                raise
            old, self._served = self._served, new
            await asyncio.to_thread(self.stage.drop, old)

    async def health(self) -> None:
        """See `Engine.health`. Raises EngineAwayError while no server is up, EngineError when none will be again."""
        if not self._up:
            raise self._away()

    async def arrived(self, seconds: float) -> None:
        """Wait until a server is up. Raises DeadlineError, or EngineError when all were given up."""
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError as error:
            urls = ", ".join(server.api.url for server in self.servers)
            raise DeadlineError(f"No SGLang server at {urls} served the model within {seconds:.0f} s; see their logs.") from error
        if self._failure:
            raise EngineError(self._failure)

    async def close(self) -> None:
        """End what runs, and the server if it is ours; whoever still waits gets an EngineError."""
        self._fail("The SGLang engine is closed; open another one.")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self.servers:
            await server.close()
            await server.api.close()
        if self.keeper:
            await self.keeper.stop()
        await asyncio.to_thread(self.stage.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _go_on(self, draft: Draft) -> None:
        """Have one server sample more of ``draft``."""
        if not self._up:
            raise self._away()
        server = await self._floor.enter(draft.sequence)
        try:
            answer = await server.ask(draft)
            self._take(draft, answer)
            if not answer.ids:
                raise EngineError(f"The SGLang server at {server.api.url} ended a request ({answer.finish}) without a token.")
            self._floor.router.remember(draft.sequence, server)
        except UnavailableError:
            server.suspect.set()
            raise
        finally:
            self._floor.leave(server)

    def _take(self, draft: Draft, answer: Answer) -> None:
        """Add ``answer`` to ``draft`` and to what was computed, which counts even if the draft is given up later."""
        prefilled, cached = draft.prefilled, draft.cached
        draft.take(answer)
        self._totals.prefilled += draft.prefilled - prefilled
        self._totals.cached += draft.cached - cached
        self._totals.decoded += len(answer.ids)

    async def _swap(self, new: Staged) -> None:
        """Bring ``new`` to every server that is up. One that refuses what another takes is left out until it takes it.

        What is raised is for the caller to count.
        """
        while not (up := self._up):
            if self._failure:
                raise EngineError(self._failure)
            self._arrived.clear()
            await self._arrived.wait()
        results = await asyncio.gather(*(server.swap(new) for server in up), return_exceptions=True)
        errors = [error for error in results if isinstance(error, BaseException)]
        # A refusal is the one to tell: the others may have failed for any reason.
        told = min(errors, key=lambda error: not isinstance(error, WeightsError)) if len(errors) == len(up) else None
        for error in errors:
            if not isinstance(error, TreeGrpoError):
                raise error
            if error is not told:
                self._count(error)
                log.warning("%s", error)
        for server in up:
            if told is None and server.serves != new:
                server.serves = None
            server.suspect.set()
        self._floor.serve()
        if isinstance(told, WeightsError):
            raise told
        if told is not None:
            raise UnavailableError(f"No server took version {new.version}: {told}") from told

    def _keeping(self) -> list[Callable[[], Awaitable[str]]]:
        """The endless work that keeps servers up."""
        if self.keeper:
            return [partial(self.keeper.run, lambda: self._served, self._changed, self._count)]
        return [partial(keep_remote, server, lambda: self._served, self._changed, self._count) for server in self.servers]

    async def _guard(self, keep: Callable[[], Awaitable[str]]) -> None:
        """Run ``keep``; when it gives up and was the last to do so, so does the engine."""
        try:
            why = await keep()
        except Exception as error:  # whatever it was, nobody may wait for ever
            log.exception("looking after an SGLang server failed")
            why = f"Looking after an SGLang server failed ({error!r})."
        log.error("%s", why)
        self._kept -= 1
        if not self._kept:
            self._fail(f"{why} Restart the sampler.")

    @property
    def _up(self) -> list[Server]:
        return [server for server in self.servers if server.up]

    def _away(self) -> EngineError:
        """Why nothing can be generated, when no server is up."""
        if self._failure:
            return EngineError(self._failure)
        urls = ", ".join(server.api.url for server in self.servers)
        return EngineAwayError("engine", urls, "is being started again" if self.keeper else "does not answer", certain=True)

    def _changed(self) -> None:
        if self._up:
            self._arrived.set()
            self._floor.serve()
        else:
            self._floor.fail(self._away)

    def _count(self, error: BaseException) -> None:
        self._errors[type(error).__name__] += 1

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why
        self._floor.fail(lambda: EngineError(self._failure))
        for server in self.servers:
            server.lose()
        self._arrived.set()

    def _checked(self, prefix: Sequence[int] | TokenIds, sampling: Sampling) -> TokenIds:
        if self._failure:
            raise EngineError(self._failure)
        return check_request(prefix, sampling, self.context, self._limits.vocabulary)
