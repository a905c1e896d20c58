"""The processes of a run on one machine: started in order, each when the one before is ready; stopped in reverse.

    broker ─► retriever ─► intake ─► trainer ─► samplers

Samplers are replaceable: one that dies is started again, while the others go on. The end of any other is the end of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from services.cli.process import Child, Program
from services.cli.ready import Probe, wait_ready
from treegrpo.errors import UnavailableError

READY_SECONDS = 60.0
GRACE_SECONDS = 30.0
"""The intake closes open leases in 20."""
RESTART_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0)
SETTLED_SECONDS = 60.0
"""A sampler that lived this long has earned its restarts back."""

Say = Callable[[str], None]


class Crew:
    """The running processes. Use it as an async context manager: at the end of the block none is left."""

    def __init__(self, arguments: Sequence[str], logs: Path, say: Say) -> None:
        """Args:
        arguments: the configuration as every process is told it, ``[CONFIG.toml] [--section.key value …]``.
        logs: where each process's log file goes.
        say: prints a line for the user.
        """
        self._arguments = arguments
        self._logs = logs
        self._say = say
        self._children: dict[str, Child] = {}
        self._samplers: dict[str, Child] = {}
        self._keepers: set[asyncio.Task[bool]] = set()
        self.grace = GRACE_SECONDS
        """Seconds a process has to end in, before it is killed."""

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(child.stop(self.grace) for child in self._samplers.values()))
        for child in reversed(self._children.values()):
            await child.stop(self.grace)

    async def start(self, program: Program, probe: Probe | None = None) -> Child:
        """Start ``program`` and wait until ``probe`` finds it ready.

        Raises:
            UnavailableError: it ended instead.
            DeadlineError: it was not ready in time.
        """
        began = asyncio.get_running_loop().time()
        child = self._children[program.name] = await Child.start(program, self._arguments, self._logs)
        if probe is not None:
            waiting = asyncio.create_task(wait_ready(program.name, probe, READY_SECONDS), name=f"wait-for-{program.name}")
            try:
                await asyncio.wait({waiting, child.ended}, return_when=asyncio.FIRST_COMPLETED)
                if child.ended.done():
                    raise UnavailableError(child.obituary())
                await waiting
            finally:
                waiting.cancel()
            self._say(f"The {program.name} is ready after {asyncio.get_running_loop().time() - began:.1f} s.")
        return child

    def keep(self, program: Program) -> None:
        """Keep a sampler running from now on."""
        self._keepers.add(asyncio.create_task(self._keep(program), name=f"keep-{program.name}"))

    async def watch(self, last: Child) -> None:
        """Return when ``last`` has ended well.

        Raises:
            UnavailableError: it, or any other process that is needed, ended otherwise; or the last sampler was given up.
        """
        ends = {child.ended for child in self._children.values()}
        samplers = asyncio.create_task(self._samplers_given_up(), name="samplers-given-up")
        try:
            await asyncio.wait({*ends, samplers}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            samplers.cancel()
        if last.code == 0:
            return
        if samplers.done():
            await samplers
        gone = [child for child in self._children.values() if child.ended.done()] or list(self._samplers.values())
        raise UnavailableError(gone[0].obituary())

    async def _samplers_given_up(self) -> None:
        """Return when none is left and not all went well; where all did, the run drains and the learner has the last word."""
        given_up = [await asyncio.shield(keeper) for keeper in list(self._keepers)]
        if not any(given_up):
            await asyncio.get_running_loop().create_future()

    async def farewell(self, seconds: float) -> None:
        """Wait for samplers that were told to drain."""
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=seconds)

    async def _keep(self, program: Program) -> bool:
        """Run ``program`` until it ends well; True if it is given up instead."""
        clock = asyncio.get_running_loop().time
        attempt = 0
        while True:
            began = clock()
            child = self._samplers[program.name] = await Child.start(program, self._arguments, self._logs)
            await asyncio.shield(child.ended)
            if child.code == 0:  # told to drain
                return False
            attempt = 0 if clock() - began > SETTLED_SECONDS else attempt
            if attempt == len(RESTART_SECONDS):
                self._say(f"{child.obituary()}; it has been started {attempt + 1} times and is given up.")
                return True
            self._say(f"{child.obituary()}; starting it again in {RESTART_SECONDS[attempt]:.0f} s.")
            await asyncio.sleep(RESTART_SECONDS[attempt])
            attempt += 1
