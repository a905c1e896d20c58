"""Supervision of SGLang servers: load twice a second, a health check now and then; restart of a child that is lost.

up ──── does not answer, hangs ────► down: its requests go elsewhere or wait
▲                                     │
└── answers, serves our version ◄─────┘   a child is restarted, a server that others run is polled until it answers
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from services.sampler.engines.sglang.server.server import SGLangServer, bring_up_server
from services.sampler.engines.sglang.server.server_process import SGLangProcess
from services.sampler.engines.sglang.server.timings import TIMINGS, SGLangTimings
from services.sampler.engines.sglang.server.weight_staging import StagedVersion
from treegrpo.errors import TreeGrpoError, UnavailableError
from treegrpo.runtime.supervisor import Ended, Supervisor

log = logging.getLogger(__name__)
MAX_FAILED_POLLS = 3
"""Polls in a row that fail before a server is regarded as lost."""


@dataclass(frozen=True, slots=True)
class EngineCallbacks:
    """The callbacks from supervision into the engine."""

    served: Callable[[], StagedVersion]
    """The version that servers are to serve now."""
    state_changed: Callable[[], None]
    """Called when a server came up, was lost, or may have a free slot."""
    count_error: Callable[[BaseException], None]


async def monitor_server(server: SGLangServer, engine: EngineCallbacks, timings: SGLangTimings = TIMINGS) -> None:
    """Poll ``server``, which is up, until it can no longer be used; then mark it lost and return."""
    healthy, read, failed = time.monotonic(), -math.inf, 0
    try:
        while failed < MAX_FAILED_POLLS:
            with suppress(TimeoutError):
                async with asyncio.timeout(timings.poll):
                    await server.check_requested.wait()
            server.check_requested.clear()
            if server.swapping:
                healthy = time.monotonic()
                continue
            # An update may have failed half-way, or missed a server that was just coming up.
            if server.serving is None or server.serving.version < engine.served().version:
                log.warning("the SGLang server at %s does not serve version %s", server.client.url, engine.served().version)
                return
            try:
                server.load = await server.client.get_load()
                if time.monotonic() - healthy > timings.health_interval:
                    await server.client.check_health()
                    healthy = time.monotonic()
            except TreeGrpoError as error:
                failed += 1
                engine.count_error(error)
                log.warning("%s", error)
                continue
            failed = 0
            server.request_limit.adjust_limit(server.load.usage, server.slots_taken)
            engine.state_changed()
            if time.monotonic() - read > timings.metrics_interval:
                read = time.monotonic()
                await _read_metrics(server, engine)
    finally:
        server.mark_lost()
        engine.state_changed()


async def _read_metrics(server: SGLangServer, engine: EngineCallbacks) -> None:
    """Read the server's Prometheus metrics. A failure does not make the server unusable."""
    try:
        server.metrics = await server.client.get_metrics()
    except TreeGrpoError as error:
        server.metrics = ()
        engine.count_error(error)
        log.warning("%s", error)


async def supervise_remote(server: SGLangServer, engine: EngineCallbacks, timings: SGLangTimings = TIMINGS) -> str:
    """Use a server that others run whenever it can be used; returns why it is given up."""
    retries, logged = timings.outage.schedule(), ""
    while True:
        try:
            await bring_up_server(server, engine.served())
        except TreeGrpoError as error:
            if str(error) != logged:
                logged = str(error)
                engine.count_error(error)
                log.warning("%s", logged)
            if not await retries.sleep():
                return f"{error} It has been so for {timings.outage.seconds:.0f} s."
            continue
        server.up, logged = True, ""
        engine.state_changed()
        log.info("the SGLang server at %s serves version %s", server.client.url, engine.served().version)
        await monitor_server(server, engine, timings)
        retries.reset()


class ServerSupervisor:
    """Runs a server as a child process and restarts it when it is lost."""

    def __init__(
        self,
        server: SGLangServer,
        launch: Callable[[StagedVersion], Awaitable[SGLangProcess]],
        timings: SGLangTimings = TIMINGS,
    ) -> None:
        """``launch``: starts the process for a version."""
        self._server = server
        self._launch = launch
        self._timings = timings
        self._process: SGLangProcess | None = None
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Of the process that runs or ran last; 0 before the first."""
        return self._process.pid if self._process else 0

    async def start_child(self, served: StagedVersion) -> None:
        """Start the server and wait until it is ready. Raises EngineError, DeadlineError with its last error."""
        began = time.monotonic()
        process = self._process = await self._launch(served)

        async def check_ready() -> None:
            client = self._server.client
            if (path := (await client.get_model_info()).model_path) != str(served.path):
                raise UnavailableError(f"Another server, with the model in {path}, answers at {client.url}.")
            await bring_up_server(self._server, served)

        await process.wait_until_ready(check_ready, self._timings.start)
        self._server.up = True
        log.info("the SGLang server (process %d) is ready after %.1f s", process.pid, time.monotonic() - began)

    async def supervise_child(self, engine: EngineCallbacks) -> str:
        """Keep the started server running; returns why it is given up."""
        supervisor = Supervisor(
            self._timings.restart, lambda why, delay: log.warning("%s It is restarted in %.0f s.", why, delay)
        )
        ended = await supervisor.supervise(lambda: self._run_once(engine))
        return f"{ended.reason} It has been started {supervisor.starts} times and is given up."

    async def _run_once(self, engine: EngineCallbacks) -> Ended:
        """Start the server unless it is up, and monitor it until it is lost."""
        if not self._server.up:
            self.restarts += 1
            try:
                await self.start_child(engine.served())
            except TreeGrpoError as error:
                engine.count_error(error)
                await self.stop_child()
                return Ended(str(error))
            finally:
                engine.state_changed()
        began = time.monotonic()  # the time it took to be ready does not count
        return Ended(await self._until_lost(engine), time.monotonic() - began)

    async def _until_lost(self, engine: EngineCallbacks) -> str:
        """Monitor the server until it ends or hangs, then end the process; returns its exit message."""
        process = self._process
        assert process is not None  # noqa: S101  # it was started
        monitoring = asyncio.create_task(monitor_server(self._server, engine, self._timings), name="sglang-monitor")
        try:
            await asyncio.wait({monitoring, process.ended}, return_when=asyncio.FIRST_COMPLETED)
            if process.ended.done():
                engine.count_error(UnavailableError(process.exit_message()))
        finally:
            monitoring.cancel()
            await asyncio.wait({monitoring})
            await process.stop()
        if not monitoring.cancelled():
            monitoring.result()
        return process.exit_message()

    async def stop_child(self) -> None:
        """End the process."""
        if self._process is not None:
            await self._process.stop()
