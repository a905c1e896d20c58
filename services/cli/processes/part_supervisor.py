"""One part of a run, kept running: its process is started again, a while later, when it ends before its time.

start ─► ready ─► ended ─┬─ for a reason that stays (code 2) ─────► given up, also while the run drains
  ▲                      ├─ in its time, or while the run drains ─► over
  └──── back-off ◄───────┴─ in any other way, not too often
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.cli.processes.program import Child, Program
from services.cli.processes.readiness import Probe, wait_ready
from treegrpo.errors import DeadlineError, PartError
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT

READY_SECONDS = 300.0
"""An intake that reads a long journal back needs minutes."""
RESTART_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0)
SETTLED_SECONDS = 60.0
"""A process that lived this long has earned its restarts back."""

Say = Callable[[str], None]


def never() -> bool:
    """The work of most parts has no end of its own."""
    return False


@dataclass(frozen=True, slots=True)
class Part:
    program: Program
    probe: Probe | None = None
    """Finds it ready; None: nobody needs to know."""
    done: Callable[[], bool] = never
    """Whether its work is done, if it ends with code 0."""

    @property
    def name(self) -> str:
        return self.program.name


class Keeper:
    def __init__(self, part: Part, start: Callable[[Program], Awaitable[Child]], say: Say, drain: asyncio.Event) -> None:
        """Args:
        part: what to keep running.
        start: starts its process.
        say: prints a line for the user.
        drain: set once the run ends: then nothing is started any more.
        """
        self._part = part
        self._start = start
        self._say = say
        self._drain = drain
        self.ready = asyncio.Event()
        """It was ready once."""
        self.child: Child | None = None
        """Its newest process."""

    async def run(self) -> None:
        """Return when its work is over.

        Raises:
            PartError: it ended for a reason that stays, or too often.
            DeadlineError: it was not ready in time, at its first start.
        """
        clock, attempt = asyncio.get_running_loop().time, 0
        while not self._drain.is_set():
            began = clock()
            child = self.child = await self._start(self._part.program)
            try:
                await self._live(child, began)
            except DeadlineError:
                if not self.ready.is_set():
                    raise
                await child.stop(0.0)  # it was ready once: it hangs, and that may pass
            if child.code == FAILED:
                raise PartError(child.obituary())
            if self._drain.is_set() or (child.code == 0 and self._part.done()):
                return
            attempt = 0 if clock() - began > SETTLED_SECONDS else attempt
            if attempt == len(RESTART_SECONDS):
                sentence = f"{child.obituary()}; it has been started {attempt + 1} times and is given up"
                raise PartError(sentence, is_transient=child.code == TRANSIENT)
            self._say(f"{child.obituary()}; starting it again in {RESTART_SECONDS[attempt]:.0f} s.")
            await self._back_off(RESTART_SECONDS[attempt])
            attempt += 1

    async def _live(self, child: Child, began: float) -> None:
        """Return when ``child`` has ended. Raises DeadlineError."""
        waiting = asyncio.create_task(self._until_ready(began), name=f"wait-for-{child.name}")
        try:
            await asyncio.wait({waiting, child.ended}, return_when=asyncio.FIRST_COMPLETED)
            if not child.ended.done():
                await waiting
        finally:
            waiting.cancel()
        await asyncio.shield(child.ended)

    async def _until_ready(self, began: float) -> None:
        if self._part.probe is not None:
            await wait_ready(self._part.name, self._part.probe, READY_SECONDS)
            again = "ready again" if self.ready.is_set() else "ready"
            self._say(f"The {self._part.name} is {again} after {asyncio.get_running_loop().time() - began:.1f} s.")
        self.ready.set()

    async def _back_off(self, seconds: float) -> None:
        """Wait, but not while the run drains."""
        draining = asyncio.create_task(self._drain.wait(), name="drain")
        await asyncio.wait({draining}, timeout=seconds)
        draining.cancel()
