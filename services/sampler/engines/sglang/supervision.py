"""Keeps an eye on a server: how full it is twice a second, whether it still generates now and then.

up ──── does not answer, hangs ────► down: its requests go elsewhere or wait
▲                                     │
└── answers, serves our version ◄─────┘   a child is started again, a server that others run is asked until it answers
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from services.sampler.engines.sglang.api.server_process import Child
from services.sampler.engines.sglang.server import Server, wake
from services.sampler.engines.sglang.weight_staging import Staged
from treegrpo.errors import TreeGrpoError, UnavailableError

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
METRICS_SECONDS = 5.0
"""Between two looks at its metrics, which Prometheus gets from the sampler."""
HEALTH_SECONDS = 15.0
"""Between two requests that prove that it generates; `Api` says how long each may take."""
MISSES = 3
"""Looks in a row that fail before a server is taken for lost."""
START_SECONDS = 900.0
"""The longest a server may take to load a model and be ready."""
ABSENT_SECONDS = 300.0
"""A server that others run may be gone for so long before it is given up."""
RESTART_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0)
SETTLED_SECONDS = 120.0
"""A server that ran this long has earned its restarts back."""

Count = Callable[[BaseException], None]


async def look_after(server: Server, served: Callable[[], Staged], changed: Callable[[], None], count: Count) -> None:
    """Watch ``server``, which is up, until it no longer can be used; then return, with it down."""
    healthy, read, misses = time.monotonic(), -math.inf, 0
    try:
        while misses < MISSES:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await server.suspect.wait()
            server.suspect.clear()
            if server.swapping:
                healthy = time.monotonic()
                continue
            # An update may have failed on the way, or passed by a server that was just coming up.
            if server.serves is None or server.serves.version < served().version:
                log.warning("the SGLang server at %s does not serve version %s", server.api.url, served().version)
                return
            try:
                server.load = await server.api.load()
                if time.monotonic() - healthy > HEALTH_SECONDS:
                    await server.api.health()
                    healthy = time.monotonic()
            except TreeGrpoError as error:
                misses += 1
                count(error)
                log.warning("%s", error)
                continue
            misses = 0
            server.pressure.look(server.load.usage, server.taken)
            changed()
            if time.monotonic() - read > METRICS_SECONDS:
                read = time.monotonic()
                await _read_metrics(server, count)
    finally:
        server.lose()
        changed()


async def _read_metrics(server: Server, count: Count) -> None:
    """Read what it says to Prometheus. That it does not say it well is no reason to use it less."""
    try:
        server.families = await server.api.metrics()
    except TreeGrpoError as error:
        server.families = ()
        count(error)
        log.warning("%s", error)


async def keep_remote(server: Server, served: Callable[[], Staged], changed: Callable[[], None], count: Count) -> str:
    """Use a server that others run whenever it can be used; returns why it is given up."""
    since, said = time.monotonic(), ""
    while True:
        try:
            await wake(server, served())
        except TreeGrpoError as error:
            if time.monotonic() - since > ABSENT_SECONDS:
                return f"{error} It has been so for {ABSENT_SECONDS:.0f} s."
            if str(error) != said:
                said = str(error)
                count(error)
                log.warning("%s", said)
            await asyncio.sleep(LOOK_SECONDS)
            continue
        server.up, said = True, ""
        changed()
        log.info("the SGLang server at %s serves version %s", server.api.url, served().version)
        await look_after(server, served, changed, count)
        since = time.monotonic()


class Keeper:
    """Runs a server as a child and starts it again when it dies."""

    def __init__(self, server: Server, launch: Callable[[Staged], Awaitable[Child]]) -> None:
        """``launch``: starts the process for a version."""
        self._server = server
        self._launch = launch
        self._child: Child | None = None
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Of the process that runs or ran last; 0 before the first."""
        return self._child.pid if self._child else 0

    async def start(self, served: Staged) -> None:
        """Start it and wait until it is ready. Raises EngineError, DeadlineError with its last words."""
        began = time.monotonic()
        child = self._child = await self._launch(served)

        async def ready() -> None:
            api = self._server.api
            if (path := (await api.model()).model_path) != str(served.path):
                raise UnavailableError(f"Another server, with the model in {path}, answers at {api.url}.")
            await wake(self._server, served)

        await child.ready(ready, START_SECONDS)
        self._server.up = True
        log.info("the SGLang server (process %d) is ready after %.1f s", child.pid, time.monotonic() - began)

    async def run(self, served: Callable[[], Staged], changed: Callable[[], None], count: Count) -> str:
        """Keep the started server running; returns why it is given up."""
        attempt, why = 0, ""
        while True:
            if self._server.up:
                began = time.monotonic()  # how long it took to be ready earns nothing
                why = await self._until_lost(served, changed, count)
                attempt = 0 if time.monotonic() - began > SETTLED_SECONDS else attempt
            if attempt == len(RESTART_SECONDS):
                return f"{why} It has been started {attempt + 1} times and is given up."
            log.warning("%s It is started again in %.0f s.", why, RESTART_SECONDS[attempt])
            await asyncio.sleep(RESTART_SECONDS[attempt])
            attempt += 1
            self.restarts += 1
            try:
                await self.start(served())
            except TreeGrpoError as error:
                count(error)
                why = str(error)
                await self.stop()
            changed()

    async def _until_lost(self, served: Callable[[], Staged], changed: Callable[[], None], count: Count) -> str:
        """Watch until it ends or hangs; returns its obituary, with no process left. Raises what watching it raised."""
        child = self._child
        assert child is not None  # noqa: S101  # it was started
        watching = asyncio.create_task(look_after(self._server, served, changed, count), name="sglang-look")
        try:
            await asyncio.wait({watching, child.ended}, return_when=asyncio.FIRST_COMPLETED)
            if child.ended.done():
                count(UnavailableError(child.obituary()))
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await child.stop()
        if not watching.cancelled():
            watching.result()
        return child.obituary()

    async def stop(self) -> None:
        """End the process."""
        if self._child is not None:
            await self._child.stop()
