"""The SGLang engine: generates on one or several servers, supervises them, updates their weights.

generate() ─► admission queue: a slot, by prefix ─► server: /generate ─► pending generation ─► stop? full? ─► completion
▲                                                                            │
└────────────────── failed, aborted, stopped too early ──────────────────────┘   sampled tokens are kept
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

from services.sampler.engines.base import Completion, EngineCounters, SamplingParams, check_request
from services.sampler.engines.sglang.admission_queue import AdmissionQueue
from services.sampler.engines.sglang.server.pending_generation import PendingGeneration
from services.sampler.engines.sglang.server.responses import GenerateResponse
from services.sampler.engines.sglang.server.server import SGLangServer
from services.sampler.engines.sglang.server.timings import TIMINGS, SGLangTimings
from services.sampler.engines.sglang.server.weight_staging import StagedVersion, WeightStaging
from services.sampler.engines.sglang.supervision import EngineCallbacks, ServerSupervisor, supervise_remote
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


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most that a request may ask for."""

    context: int
    """Tokens a prefix and its completion may have together."""
    vocabulary: int


class SGLangEngine:
    """An `Engine` on one or several servers. `factory.py` makes it; use it as a context manager or call `close_engine`."""

    def __init__(
        self,
        servers: Sequence[SGLangServer],
        supervisor: ServerSupervisor | None,
        staging: WeightStaging,
        served: StagedVersion,
        tokenizer: Tokenizer,
        limits: RequestLimits,
        timings: SGLangTimings = TIMINGS,
    ) -> None:
        """Args:
        servers: those that serve ``served`` are up.
        supervisor: runs the one server as a child; None: others run them.
        staging: where versions are staged for the servers; removed with the engine.
        served: what the servers serve now.
        tokenizer: the model's.
        limits: of every request.
        timings: back-off delays and intervals.
        """
        self.servers = servers
        self._queue = AdmissionQueue(servers)
        self.supervisor = supervisor
        self.staging = staging
        self._served = served
        self._limits = limits
        self._timings = timings
        self._stops = StopStrings(tokenizer)
        self._eos = tokenizer.eos
        self._totals = EngineCounters()
        self._errors: Counter[str] = Counter()
        self._loading = asyncio.Lock()
        self._server_up = asyncio.Event()
        """Set when a server has come up since it was cleared."""
        self._failure = ""
        """Why no request can be served any more; empty while the engine works."""
        self._tasks = [
            asyncio.create_task(self._supervise(supervise), name="sglang-supervise") for supervise in self._supervisions()
        ]
        self._supervised = len(self._tasks)
        """Servers that are not given up."""

    @property
    def version(self) -> PolicyVersion:
        return self._served.version

    @property
    def context(self) -> int:
        return self._limits.context

    @property
    def counters(self) -> EngineCounters:
        """What the engine has done and holds now."""
        loads = [server.load for server in self.servers if server.load is not None]
        return EngineCounters(
            prefilled=self._totals.prefilled,
            cached=self._totals.cached,
            decoded=self._totals.decoded,
            running=sum(load.running for load in loads),
            waiting=self._queue.waiting + sum(load.queued for load in loads),
            limit=sum(server.request_limit.current for server in self.servers if server.up),
            cache_tokens=sum(load.used for load in loads),
            cache_capacity=sum(load.capacity for load in loads),
            stalled=sum(server.stalled for server in self.servers),
            restarts=self.supervisor.restarts if self.supervisor else 0,
            errors=dict(self._errors),
        )

    @property
    def server_metrics(self) -> Mapping[str, Sequence[Metric]]:
        """The Prometheus metrics of its servers, by URL."""
        return {server.client.url: server.metrics for server in self.servers}

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> Completion:
        """See `Engine.generate`. Retries failures with back-off, for about twenty seconds.

        Raises EngineAwayError as soon as no server is up.
        """
        ids = self._check_request(prefix, sampling)
        room = min(sampling.max_tokens, self.context - len(ids))
        pending = PendingGeneration(ids, sampling, room, self._stops, self._eos)
        retries, sampled = self._timings.retry.schedule(), 0
        while pending.finish is None:
            try:
                await self._generate_more(pending)
            except EngineAwayError:
                raise
            except (UnavailableError, DeadlineError, ContractError, EngineError) as error:
                self._count_error(error)
                if not self._servers_up:
                    raise self._unavailable_error() from error
                if not await retries.sleep():
                    raise EngineError(f"{error} It has been tried {retries.failures + 1} times.") from error
            if len(pending.ids) > sampled:
                sampled = len(pending.ids)
                retries.reset()
        return pending.completion()

    async def load_weights(self, version: PolicyVersion, path: Path) -> None:
        """See `Engine.load_weights`. The files are checked and staged while requests run.

        Raises UnavailableError if no server took the version; it is then safe to try again.
        """
        async with self._loading:
            if version == self.version:
                return
            new = await asyncio.to_thread(self.staging.stage_weights, version, path)
            try:
                await self._swap_servers(new)
            except BaseException:
                await asyncio.to_thread(self.staging.remove_version, new)
                raise
            old, self._served = self._served, new
            await asyncio.to_thread(self.staging.remove_version, old)

    async def check_health(self) -> None:
        """See `Engine.check_health`. Raises EngineAwayError while no server is up, EngineError when none will be again."""
        if not self._servers_up:
            raise self._unavailable_error()

    async def wait_until_up(self, seconds: float) -> None:
        """Wait until a server is up. Raises DeadlineError, or EngineError when all were given up."""
        try:
            async with asyncio.timeout(seconds):
                await self._server_up.wait()
        except TimeoutError as error:
            urls = ", ".join(server.client.url for server in self.servers)
            raise DeadlineError(f"No SGLang server at {urls} served the model within {seconds:.0f} s; see their logs.") from error
        if self._failure:
            raise EngineError(self._failure)

    async def close_engine(self) -> None:
        """Cancel all requests, and end the server if it is a child; waiting requests fail with an EngineError."""
        self._fail("The SGLang engine is closed; open another one.")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self.servers:
            await server.cancel_requests()
            await server.client.close_connections()
        if self.supervisor:
            await self.supervisor.stop_child()
        await asyncio.to_thread(self.staging.remove_directory)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_engine()

    async def _generate_more(self, pending: PendingGeneration) -> None:
        """Have one server sample more of ``pending``."""
        if not self._servers_up:
            raise self._unavailable_error()
        server = await self._queue.acquire_slot(pending.sequence)
        try:
            response = await server.continue_generation(pending)
            self._append_response(pending, response)
            if not response.ids:
                raise EngineError(
                    f"The SGLang server at {server.client.url} ended a request ({response.finish}) without a token."
                )
            self._queue.router.record_prefix(pending.sequence, server)
        except UnavailableError:
            server.check_requested.set()
            raise
        finally:
            self._queue.release_slot(server)

    def _append_response(self, pending: PendingGeneration, response: GenerateResponse) -> None:
        """Add ``response`` to ``pending`` and to the counters, where it counts even if the generation fails later."""
        prefilled, cached = pending.prefilled, pending.cached
        pending.append_response(response)
        self._totals.prefilled += pending.prefilled - prefilled
        self._totals.cached += pending.cached - cached
        self._totals.decoded += len(response.ids)

    async def _swap_servers(self, new: StagedVersion) -> None:
        """Swap ``new`` into every server that is up. One that alone refuses it is left out until it accepts it.

        The error that is raised is for the caller to count.
        """
        while not (up := self._servers_up):
            if self._failure:
                raise EngineError(self._failure)
            self._server_up.clear()
            await self._server_up.wait()
        results = await asyncio.gather(*(server.swap_weights(new) for server in up), return_exceptions=True)
        errors = [error for error in results if isinstance(error, BaseException)]
        # A refusal is the one to raise: the others may have failed for any reason.
        raised = min(errors, key=lambda error: not isinstance(error, WeightsError)) if len(errors) == len(up) else None
        for error in errors:
            if not isinstance(error, TreeGrpoError):
                raise error
            if error is not raised:
                self._count_error(error)
                log.warning("%s", error)
        for server in up:
            if raised is None and server.serving != new:
                server.serving = None
            server.check_requested.set()
        self._queue.dispatch_waiting()
        if isinstance(raised, WeightsError):
            raise raised
        if raised is not None:
            raise UnavailableError(f"No server took version {new.version}: {raised}") from raised

    def _supervisions(self) -> list[Callable[[], Awaitable[str]]]:
        """The endless tasks that keep servers up."""
        callbacks = EngineCallbacks(lambda: self._served, self._on_state_change, self._count_error)
        if self.supervisor:
            return [partial(self.supervisor.supervise_child, callbacks)]
        return [partial(supervise_remote, server, callbacks, self._timings) for server in self.servers]

    async def _supervise(self, supervise: Callable[[], Awaitable[str]]) -> None:
        """Supervise a server until it is given up; the engine fails when that was the last one."""
        try:
            reason = await supervise()
        except Exception as error:  # whatever it was, no request may wait for ever
            log.exception("supervision of an SGLang server failed")
            reason = f"Supervision of an SGLang server failed ({error!r})."
        log.error("%s", reason)
        self._supervised -= 1
        if not self._supervised:
            self._fail(f"{reason} Restart the sampler.")

    @property
    def _servers_up(self) -> list[SGLangServer]:
        return [server for server in self.servers if server.up]

    def _unavailable_error(self) -> EngineError:
        """The error of a request while no server is up."""
        if self._failure:
            return EngineError(self._failure)
        urls = ", ".join(server.client.url for server in self.servers)
        state = "is being started again" if self.supervisor else "does not answer"
        return EngineAwayError("engine", urls, state, certain=True)

    def _on_state_change(self) -> None:
        if self._servers_up:
            self._server_up.set()
            self._queue.dispatch_waiting()
        else:
            self._queue.fail_waiting(self._unavailable_error)

    def _count_error(self, error: BaseException) -> None:
        self._errors[type(error).__name__] += 1

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._queue.fail_waiting(lambda: EngineError(self._failure))
        for server in self.servers:
            server.mark_lost()
        self._server_up.set()

    def _check_request(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> TokenIds:
        if self._failure:
            raise EngineError(self._failure)
        return check_request(prefix, sampling, self.context, self._limits.vocabulary)
