"""The driver: does one fault after another to a run, each time waits until the run has recovered, and watches its memory.

fault ─► all parts ready, all streams open ─► every part has done new work ─► audit, if the learner started again
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.chaos.audit import Audit, audit
from tests.chaos.faults import LEARNER, Fault, Kind
from tests.chaos.history import Archive
from tests.chaos.hostile import NAME as HOSTILE
from tests.chaos.keeper import Keeper
from tests.chaos.signs import Signs
from tests.chaos.stage import RUN, Stage
from treegrpo.errors import DeadlineError, UnavailableError
from treegrpo.wire.control import RunState, publish_state

POLL_SECONDS = 0.25
RECOVERY_SECONDS = 180.0
START_SECONDS = 240.0
WATCH_SECONDS = 1.0
DRAIN_SECONDS = 60.0
"""Every part says 20 or less; the trainer writes its checkpoint besides."""


@dataclass(slots=True)
class Outcome:
    """A fault and what became of it."""

    fault: Fault
    recovery: float | None = None
    """Seconds from the end of the fault until everybody had done new work; None: it did not come to that."""
    started: dict[str, int] = field(default_factory=dict[str, int])
    """Parts that were started again, how often."""
    steps: int = 0
    """Steps trained from the beginning of the fault to the recovery."""
    said: str = ""
    """What was missing at the deadline."""
    findings: list[str] = field(default_factory=list[str])
    """Of the audit after it."""


class Driver:
    def __init__(self, stage: Stage, keeper: Keeper) -> None:
        self._stage = stage
        self._keeper = keeper
        self._signs = Signs(stage)
        self._archive = Archive(stage.run_dir / "journal", stage.run_dir / "archive")
        self.outcomes: list[Outcome] = []

    async def start(self) -> None:
        """Start all parts and wait until each has done its first work. Raises DeadlineError."""
        for part in (part for part in self._stage.parts if part != HOSTILE):
            self._keeper.keep(part)
        if (said := await self._recovered(dict.fromkeys([*self._stage.samplers, "trainer"], 0.0), START_SECONDS)) is not None:
            raise DeadlineError(f"The run did not start within {START_SECONDS:.0f} s: {said}")
        self._keeper.keep(HOSTILE)

    async def do(self, fault: Fault) -> Outcome:
        """Do a fault and wait for the recovery."""
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(fault.pause)
        outcome = Outcome(fault)
        self.outcomes.append(outcome)
        before, steps = self._keeper.restarts.copy(), (await self._signs.work())["trainer"]
        await self._inflict(fault)
        began, mark = clock(), await self._signs.work()
        said = await self._recovered(mark, RECOVERY_SECONDS)
        outcome.recovery, outcome.said = (clock() - began if said is None else None), said or ""
        outcome.started = dict(self._keeper.restarts - before)
        outcome.steps = round((await self._signs.work())["trainer"] - steps)
        if outcome.started.keys() & set(LEARNER):
            outcome.findings = findings(self.audit(ended=False))
        return outcome

    async def _inflict(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL:
                for part in fault.parts:
                    self._keeper.signal(part, signal.SIGKILL)
            case Kind.STOP:
                stopped = [(part, self._keeper.signal(part, signal.SIGSTOP)) for part in fault.parts]
                try:
                    await asyncio.sleep(fault.seconds)
                finally:
                    for part, pid in stopped:
                        if (child := self._keeper.child(part)) is not None and child.pid == pid:
                            self._keeper.signal(part, signal.SIGCONT)
            case Kind.CUT_OFF:
                await asyncio.gather(*(self._stage.proxies[link].fail(fault.mode, fault.seconds) for link in fault.links))

    async def _recovered(self, mark: dict[str, float], seconds: float) -> str | None:
        """None when everybody has worked since ``mark``, else what was missing after ``seconds``."""
        return await within(seconds, lambda: self._signs.resumed(mark))

    async def drain(self) -> list[str]:
        """Tell the run to drain and wait until learner and samplers have ended; what did not end well, in words."""
        self._keeper.stop(HOSTILE)
        await publish_state(self._stage.address("broker"), RUN, RunState.DRAINING)
        found = await self._ends(["trainer", *self._stage.samplers])
        self._keeper.signal("intake", signal.SIGTERM)
        return found + await self._ends(["intake"])

    async def complete(self, steps: int) -> list[str]:
        """Go on to ``steps`` without faults, and end; what did not end well, in words."""
        self._stage.steps = steps
        for part in ("intake", "trainer", *self._stage.samplers):
            self._keeper.keep(part)
        if (said := await within(START_SECONDS, self._under_way)) is not None:
            return [f"the run did not go on in the end: {said}"]
        self._keeper.keep(HOSTILE)
        done = -1.0
        while self._keeper.kept("trainer"):
            before, done = done, (await self._signs.work())["trainer"]
            if done == before:
                return [f"no step was trained for {RECOVERY_SECONDS:.0f} s in the end"]
            await self._keeper.end(["trainer"], RECOVERY_SECONDS)
        found = await self.drain()
        for part in ("retriever", "broker"):
            self._keeper.signal(part, signal.SIGTERM)
        return found + await self._ends(["retriever", "broker"])

    async def _under_way(self) -> None:
        """All streams are open, or the trainer is done already. Raises UnavailableError."""
        if self._keeper.kept("trainer"):
            await self._signs.ready()

    async def _ends(self, parts: list[str]) -> list[str]:
        await self._keeper.end(parts, DRAIN_SECONDS)
        found: list[str] = []
        for part in parts:
            code = self._keeper.lives[part][-1].child.code
            if code is None:
                found.append(f"{part} did not end within {DRAIN_SECONDS:.0f} s of being told to")
            elif code:
                found.append(f"{part} ended with code {code}")
        return found

    def audit(self, *, ended: bool) -> Audit:
        return audit(self._stage.run_dir, self._archive, ended=ended)

    async def watch(self) -> None:
        """Note memory and keep the journal's segments, for ever."""
        while True:
            self._archive.keep()
            self._keeper.weigh()
            await asyncio.sleep(WATCH_SECONDS)


async def within(seconds: float, look: Callable[[], Awaitable[None]]) -> str | None:
    """Look until it does not raise UnavailableError; what it said last when ``seconds`` are over, else None."""
    said = "nothing was looked at"
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    return await look()
                except UnavailableError as error:
                    said = str(error)
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        return said


def findings(found: Audit) -> list[str]:
    """All that an audit found wrong."""
    return [*found.lost, *found.duplicated, *found.unbalanced]
