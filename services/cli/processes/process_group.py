"""The processes of a run on one machine: started in order, each when the one before is ready; stopped in reverse order.

    broker ─► retriever ─► intake ─► trainer ─► samplers

Each is restarted when it dies (`part_supervisor.py`). Samplers are replaceable: one that is given up leaves the work to the
others. When any other part is given up, or the last sampler, the run fails. It also fails when a part has ended with a
permanent error, in any order of the parts' ends.
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

from services.cli.processes.part_supervisor import RESTARTS, PartSupervisor, SupervisedPart
from services.cli.processes.program import PartProcess, PrintLine, Program
from treegrpo.errors import DeadlineError, PartError, RunError
from treegrpo.runtime.entrypoint import FAILED
from treegrpo.runtime.supervisor import RestartPolicy

GRACE_SECONDS = 30.0
"""The intake closes open leases in 20."""


class ProcessGroup:
    """The running processes of a run. Use it as an async context manager: at the end of the block none is left."""

    def __init__(
        self,
        arguments: Sequence[str],
        logs: Path,
        print_line: PrintLine,
        stop_now: asyncio.Event | None = None,
        policy: RestartPolicy = RESTARTS,
    ) -> None:
        """Args:
        arguments: the configuration as every process gets it, ``[CONFIG.toml] [--section.key value …]``.
        logs: directory of the log files, one a process.
        print_line: prints a line for the user.
        stop_now: set to kill processes that are being stopped, without further grace.
        policy: when parts are restarted.
        """
        self._arguments = arguments
        self._logs = logs
        self._print_line = print_line
        self._stop_now = stop_now or asyncio.Event()
        self._policy = policy
        self._supervisors: dict[str, PartSupervisor] = {}
        """By part, in the order in which they were started."""
        self._samplers: list[str] = []
        self._sampler_failures: list[BaseException] = []
        """The reason for each sampler that was given up."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Raises when the run cannot continue."""
        self.draining = asyncio.Event()
        """Set when the run ends: from then on nothing is restarted."""

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if not self._failed.cancel():
            self._failed.exception()  # which may have no waiter
        await asyncio.gather(*map(self._stop_part, self._samplers))
        for part in reversed(self._supervisors):
            await self._stop_part(part)

    async def start_part(self, part: SupervisedPart) -> None:
        """Supervise ``part`` from now on, and return when it is ready or, since the run drains, finished.

        Raises what `wait_for_part` raises.
        """
        supervisor = self._supervise(part)
        ready = asyncio.create_task(supervisor.ready.wait(), name=f"{part.name}-ready")
        try:
            await asyncio.wait({ready, self._tasks[part.name], self._failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._failed.done():
            self._failed.result()

    def add_sampler(self, part: SupervisedPart) -> None:
        """Supervise a sampler from now on."""
        self._samplers.append(part.name)
        self._supervise(part)

    async def wait_for_part(self, part: str) -> None:
        """Return when the work of ``part`` is done. Raises RunError or DeadlineError when the run cannot continue."""
        await asyncio.wait({self._tasks[part], self._failed}, return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            self._failed.result()

    async def wait_for_end_of_part(self, part: str) -> None:
        """Return when ``part`` is no longer supervised, for any reason and independently of other parts."""
        await asyncio.wait({self._tasks[part]})

    async def wait_for_samplers(self, seconds: float) -> None:
        """Wait until samplers that have been told to drain have ended, or for ``seconds``."""
        if self._samplers:
            await asyncio.wait([self._tasks[name] for name in self._samplers], timeout=seconds)

    def permanent_failure(self) -> PartError | None:
        """The first part, in their order, that ended with a permanent error; None if none did. Samplers do not count."""
        processes = (supervisor.process for name, supervisor in self._supervisors.items() if name not in self._samplers)
        failed = (process for process in processes if process is not None and process.code == FAILED)
        return next((PartError(process.describe_exit()) for process in failed), None)

    def root_cause(self, error: RunError | DeadlineError) -> RunError | DeadlineError:
        """Why the run ended, which ``error`` was the first to show: a permanent error explains a transient one."""
        return (error.is_transient and self.permanent_failure()) or error

    def is_running(self, part: str) -> bool:
        """Whether a part has a running process now."""
        return not self.newest_process(part).ended.done()

    def newest_process(self, part: str) -> PartProcess:
        """The process of a part that was started, or the last one it had."""
        process = self._supervisors[part].process
        assert process is not None, part  # noqa: S101  # it was started
        return process

    def signal_part(self, part: str, number: signal.Signals) -> None:
        """Send a signal to a part, if it runs."""
        if self.is_running(part):
            with suppress(ProcessLookupError):
                os.kill(self.newest_process(part).pid, number)

    def _supervise(self, part: SupervisedPart) -> PartSupervisor:
        supervisor = PartSupervisor(part, self._launch, self._print_line, self.draining, self._policy)
        self._supervisors[part.name] = supervisor
        task = self._tasks[part.name] = asyncio.create_task(supervisor.supervise(), name=f"supervise-{part.name}")
        task.add_done_callback(self._on_part_end)
        return supervisor

    async def _launch(self, program: Program) -> PartProcess:
        return await PartProcess.launch(program, self._arguments, self._logs)

    def _on_part_end(self, task: asyncio.Task[None]) -> None:
        """A part is no longer supervised: decide whether the run can continue without it."""
        if task.cancelled() or (error := task.exception()) is None or self._failed.done():
            return
        if self.draining.is_set() and isinstance(error, DeadlineError):  # no one waits any more for it to be ready
            return
        samplers = [self._tasks[name] for name in self._samplers]
        if task not in samplers:
            self._failed.set_exception(error)
            return
        self._print_line(f"{error}.")
        self._sampler_failures.append(error)
        if all(one.done() for one in samplers) and not self.draining.is_set():
            self._failed.set_exception(min(self._sampler_failures, key=lambda one: getattr(one, "is_transient", False)))

    async def _stop_part(self, part: str) -> None:
        if (process := self._supervisors[part].process) is not None:
            await process.stop(GRACE_SECONDS, self._stop_now)
