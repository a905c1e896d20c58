"""The processes of a run on one machine: started in order, each when the one before is ready; stopped in reverse.

    broker ─► retriever ─► intake ─► trainer ─► samplers

Each is started again when it dies (`part_supervisor.py`). Samplers are replaceable: one that is given up leaves the work to the
others. When any other part is given up, or the last sampler, the run is over. So it is when a part says, in whatever
order parts end, that it ended for a reason that stays.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from services.cli.processes.part_supervisor import Keeper, Part, Say
from services.cli.processes.program import Child, Program
from treegrpo.errors import DeadlineError, PartError, RunError
from treegrpo.runtime.entrypoint import FAILED

GRACE_SECONDS = 30.0
"""The intake closes open leases in 20."""


class Crew:
    """The running processes. Use it as an async context manager: at the end of the block none is left."""

    def __init__(self, arguments: Sequence[str], logs: Path, say: Say, at_once: asyncio.Event | None = None) -> None:
        """Args:
        arguments: the configuration as every process is told it, ``[CONFIG.toml] [--section.key value …]``.
        logs: where each process's log file goes.
        say: prints a line for the user.
        at_once: set to have no more patience with processes that have to end.
        """
        self._arguments = arguments
        self._logs = logs
        self._say = say
        self._at_once = at_once or asyncio.Event()
        self._keepers: dict[str, Keeper] = {}
        """By part, in the order they were started."""
        self._samplers: list[str] = []
        self._samplers_lost: list[BaseException] = []
        """Why each of those that are given up is."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when the run cannot go on."""
        self.drain = asyncio.Event()
        """Set when the run ends: from then on nothing is started again."""

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if not self._lost.cancel():
            self._lost.exception()  # which nobody may have waited for
        await asyncio.gather(*map(self._stop, self._samplers))
        for part in reversed(self._keepers):
            await self._stop(part)

    async def start(self, part: Part) -> None:
        """Keep ``part`` running from now on, and return when it is ready or, since the run drains, over.

        Raises what `watch` raises.
        """
        keeper = self._keep(part)
        ready = asyncio.create_task(keeper.ready.wait(), name=f"{part.name}-ready")
        try:
            await asyncio.wait({ready, self._tasks[part.name], self._lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._lost.done():
            self._lost.result()

    def add(self, part: Part) -> None:
        """Keep a sampler running from now on."""
        self._samplers.append(part.name)
        self._keep(part)

    async def watch(self, part: str) -> None:
        """Return when the work of ``part`` is over. Raises RunError or DeadlineError when the run cannot go on."""
        await asyncio.wait({self._tasks[part], self._lost}, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done():
            self._lost.result()

    async def over(self, part: str) -> None:
        """Return when ``part`` is no longer kept, however it ended and whatever others do."""
        await asyncio.wait({self._tasks[part]})

    def failure(self) -> PartError | None:
        """Of the parts that ended for a reason that stays the first in their order; None if none did. Samplers do not count."""
        children = (keeper.child for name, keeper in self._keepers.items() if name not in self._samplers)
        failed = (child for child in children if child is not None and child.code == FAILED)
        return next((PartError(child.obituary()) for child in failed), None)

    def cause(self, error: RunError | DeadlineError) -> RunError | DeadlineError:
        """Why the run ended, which ``error`` was the first to show: a part's reason that stays explains what may pass."""
        return (error.is_transient and self.failure()) or error

    def runs(self, part: str) -> bool:
        """Whether a process of a part is there now."""
        return not self.newest(part).ended.done()

    def newest(self, part: str) -> Child:
        """The process of a part that was started, or the last one it had."""
        child = self._keepers[part].child
        assert child is not None, part  # noqa: S101  # it was started
        return child

    def tell(self, part: str, number: signal.Signals) -> None:
        """Send a signal to a part, if it runs."""
        if self.runs(part):
            with suppress(ProcessLookupError):
                os.kill(self.newest(part).pid, number)

    async def farewell(self, seconds: float) -> None:
        """Wait for samplers that were told to drain."""
        if self._samplers:
            await asyncio.wait([self._tasks[name] for name in self._samplers], timeout=seconds)

    def _keep(self, part: Part) -> Keeper:
        keeper = self._keepers[part.name] = Keeper(part, self._launch, self._say, self.drain)
        task = self._tasks[part.name] = asyncio.create_task(keeper.run(), name=f"keep-{part.name}")
        task.add_done_callback(self._ended)
        return keeper

    async def _launch(self, program: Program) -> Child:
        return await Child.start(program, self._arguments, self._logs)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A part is no longer kept: see whether the run can do without it."""
        if task.cancelled() or (error := task.exception()) is None or self._lost.done():
            return
        if self.drain.is_set() and isinstance(error, DeadlineError):  # nobody waits for it to be ready any more
            return
        samplers = [self._tasks[name] for name in self._samplers]
        if task not in samplers:
            self._lost.set_exception(error)
            return
        self._say(f"{error}.")
        self._samplers_lost.append(error)
        if all(one.done() for one in samplers) and not self.drain.is_set():
            self._lost.set_exception(min(self._samplers_lost, key=lambda one: getattr(one, "is_transient", False)))

    async def _stop(self, part: str) -> None:
        if (child := self._keepers[part].child) is not None:
            await child.stop(GRACE_SECONDS, self._at_once)
