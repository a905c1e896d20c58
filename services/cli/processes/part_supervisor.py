"""Supervises one part of a run: restarts its process, with back-off, when it ends before its work is done.

start ─► ready ─► ended ─┬─ with a permanent error (code 2) ───────────► given up, also while the run drains
  ▲                      ├─ its work is done, or while the run drains ─► finished
  └──── back-off ◄───────┴─ in any other way, up to a number of restarts
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.cli.processes.program import PartProcess, PrintLine, Program
from services.cli.processes.readiness import Probe, wait_until_ready
from treegrpo.errors import DeadlineError, PartError
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT
from treegrpo.runtime.supervisor import Ended, RestartPolicy, Supervisor

READY_SECONDS = 300.0
"""Until a process has to be ready. An intake that reads a long journal back needs minutes."""
RESTARTS = RestartPolicy()


def has_no_end() -> bool:
    """`SupervisedPart.is_done` of parts whose work has no end of its own."""
    return False


@dataclass(frozen=True, slots=True)
class SupervisedPart:
    """A part of a run: its program, its readiness probe, and the test whether its work is done."""

    program: Program
    probe: Probe | None = None
    """Raises UnavailableError until the part is ready; None: it counts as ready at once."""
    is_done: Callable[[], bool] = has_no_end
    """Whether its work is done, if it ends with code 0."""

    @property
    def name(self) -> str:
        return self.program.name


class PartSupervisor:
    """Runs one part until its work is done or it is given up."""

    def __init__(
        self,
        part: SupervisedPart,
        launch: Callable[[Program], Awaitable[PartProcess]],
        print_line: PrintLine,
        draining: asyncio.Event,
        policy: RestartPolicy = RESTARTS,
    ) -> None:
        """Args:
        part: what to supervise.
        launch: starts its process.
        print_line: prints a line for the user.
        draining: set once the run ends: then nothing is restarted any more.
        policy: when it is restarted.
        """
        self._part = part
        self._launch = launch
        self._print_line = print_line
        self._draining = draining
        self._policy = policy
        self.ready = asyncio.Event()
        """Set when it was ready for the first time."""
        self.process: PartProcess | None = None
        """Its newest process."""

    async def supervise(self) -> None:
        """Return when its work is done, or when it has ended and the run drains.

        Raises:
            PartError: it ended with a permanent error, or too often.
            DeadlineError: it was not ready in time, at its first start.
        """
        supervisor = Supervisor(self._policy, self._report_restart)
        ended = await supervisor.supervise(self._run_process, self._draining)
        if ended is not None and self.process is not None:
            sentence = f"{ended.reason}; it has been started {supervisor.starts} times and is given up"
            raise PartError(sentence, is_transient=self.process.code == TRANSIENT)

    async def _run_process(self) -> Ended | None:
        """Run one process to its end; None: its work is done. Raises PartError: it ended with a permanent error."""
        clock = asyncio.get_running_loop().time
        began = clock()
        process = self.process = await self._launch(self._part.program)
        try:
            await self._wait_for_exit(process, began)
        except DeadlineError:
            if not self.ready.is_set():
                raise
            await process.stop(0.0)  # it was ready once: it hangs, and a restart may help
        if process.code == FAILED:
            raise PartError(process.describe_exit())
        if process.code == 0 and self._part.is_done():
            return None
        return Ended(process.describe_exit(), stable_seconds=clock() - began)

    def _report_restart(self, reason: str, seconds: float) -> None:
        self._print_line(f"{reason}; starting it again in {seconds:.0f} s.")

    async def _wait_for_exit(self, process: PartProcess, began: float) -> None:
        """Return when ``process`` has ended. Raises DeadlineError: it did not become ready in time."""
        waiting = asyncio.create_task(self._wait_until_ready(began), name=f"wait-for-{process.name}")
        try:
            await asyncio.wait({waiting, process.ended}, return_when=asyncio.FIRST_COMPLETED)
            if not process.ended.done():
                await waiting
        finally:
            waiting.cancel()
        await asyncio.shield(process.ended)

    async def _wait_until_ready(self, began: float) -> None:
        if self._part.probe is not None:
            await wait_until_ready(self._part.name, self._part.probe, READY_SECONDS)
            again = "ready again" if self.ready.is_set() else "ready"
            self._print_line(f"The {self._part.name} is {again} after {asyncio.get_running_loop().time() - began:.1f} s.")
        self.ready.set()
