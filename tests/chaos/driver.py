"""Injects one fault after another into a run, each time waits until it has recovered, and watches its memory.

fault ─► all parts ready, all streams open ─► every part has done new work ─► audit, if the learner started again
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.chaos.audit import RunAudit, audit_run
from tests.chaos.chaos_run import RUN, ChaosRun
from tests.chaos.faults import LEARNER, Fault, FaultKind
from tests.chaos.hostile_sampler import NAME as HOSTILE
from tests.chaos.liveness import LivenessProbes
from tests.chaos.part_restarter import PartRestarter
from tests.chaos.run_records import JournalArchive
from treegrpo.errors import DeadlineError, UnavailableError
from treegrpo.wire.control import RunState, publish_state

POLL_SECONDS = 0.25
RECOVERY_SECONDS = 180.0
START_SECONDS = 240.0
WATCH_SECONDS = 1.0
DRAIN_SECONDS = 60.0
"""Every part says 20 or less; the trainer writes its checkpoint besides."""


@dataclass(slots=True)
class FaultOutcome:
    """A fault and how the run recovered from it."""

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


class FaultDriver:
    def __init__(self, run: ChaosRun, restarter: PartRestarter) -> None:
        self._run = run
        self._restarter = restarter
        self._probes = LivenessProbes(run)
        self._archive = JournalArchive(run.run_dir / "journal", run.run_dir / "archive")
        self.outcomes: list[FaultOutcome] = []

    async def start_parts(self) -> None:
        """Start all parts and wait until each has done its first work. Raises DeadlineError."""
        for part in (part for part in self._run.parts if part != HOSTILE):
            self._restarter.start_part(part)
        if (said := await self._recovered(dict.fromkeys([*self._run.samplers, "trainer"], 0.0), START_SECONDS)) is not None:
            raise DeadlineError(f"The run did not start within {START_SECONDS:.0f} s: {said}")
        self._restarter.start_part(HOSTILE)

    async def inject_fault(self, fault: Fault) -> FaultOutcome:
        """Inject a fault and wait for the recovery."""
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(fault.pause)
        outcome = FaultOutcome(fault)
        self.outcomes.append(outcome)
        before, steps = self._restarter.restarts.copy(), (await self._probes.work_done())["trainer"]
        await self._apply_fault(fault)
        began, mark = clock(), await self._probes.work_done()
        said = await self._recovered(mark, RECOVERY_SECONDS)
        outcome.recovery, outcome.said = (clock() - began if said is None else None), said or ""
        outcome.started = dict(self._restarter.restarts - before)
        outcome.steps = round((await self._probes.work_done())["trainer"] - steps)
        if outcome.started.keys() & set(LEARNER):
            outcome.findings = findings(self.audit(ended=False))
        return outcome

    async def _apply_fault(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.KILL:
                for part in fault.parts:
                    self._restarter.send_signal(part, signal.SIGKILL)
            case FaultKind.STOP:
                stopped = [(part, self._restarter.send_signal(part, signal.SIGSTOP)) for part in fault.parts]
                try:
                    await asyncio.sleep(fault.seconds)
                finally:
                    for part, pid in stopped:
                        if (child := self._restarter.running_process(part)) is not None and child.pid == pid:
                            self._restarter.send_signal(part, signal.SIGCONT)
            case FaultKind.CUT_OFF:
                await asyncio.gather(*(self._run.proxies[link].fail(fault.mode, fault.seconds) for link in fault.links))

    async def _recovered(self, mark: dict[str, float], seconds: float) -> str | None:
        """None when everybody has worked since ``mark``, else what was missing after ``seconds``."""
        return await probe_until(seconds, lambda: self._probes.probe_new_work(mark))

    async def drain_run(self) -> list[str]:
        """Tell the run to drain and wait until learner and samplers have ended; what did not end well, in words."""
        self._restarter.stop_part(HOSTILE)
        await publish_state(self._run.address("broker"), RUN, RunState.DRAINING)
        found = await self._ends(["trainer", *self._run.samplers])
        self._restarter.send_signal("intake", signal.SIGTERM)
        return found + await self._ends(["intake"])

    async def train_to_end(self, steps: int) -> list[str]:
        """Go on to ``steps`` without faults, and end; what did not end well, in words."""
        self._run.steps = steps
        for part in ("intake", "trainer", *self._run.samplers):
            self._restarter.start_part(part)
        if (said := await probe_until(START_SECONDS, self._streams_are_open)) is not None:
            return [f"the run did not go on in the end: {said}"]
        self._restarter.start_part(HOSTILE)
        done = -1.0
        while self._restarter.is_supervised("trainer"):
            before, done = done, (await self._probes.work_done())["trainer"]
            if done == before:
                return [f"no step was trained for {RECOVERY_SECONDS:.0f} s in the end"]
            await self._restarter.wait_for_end(["trainer"], RECOVERY_SECONDS)
        found = await self.drain_run()
        for part in ("retriever", "broker"):
            self._restarter.send_signal(part, signal.SIGTERM)
        return found + await self._ends(["retriever", "broker"])

    async def _streams_are_open(self) -> None:
        """All streams are open, or the trainer is done already. Raises UnavailableError."""
        if self._restarter.is_supervised("trainer"):
            await self._probes.probe_ready()

    async def _ends(self, parts: list[str]) -> list[str]:
        await self._restarter.wait_for_end(parts, DRAIN_SECONDS)
        found: list[str] = []
        for part in parts:
            code = self._restarter.lifetimes[part][-1].child.code
            if code is None:
                found.append(f"{part} did not end within {DRAIN_SECONDS:.0f} s of being told to")
            elif code:
                found.append(f"{part} ended with code {code}")
        return found

    def audit(self, *, ended: bool) -> RunAudit:
        return audit_run(self._run.run_dir, self._archive, ended=ended)

    async def watch_memory(self) -> None:
        """Record memory and archive journal segments, for ever."""
        while True:
            self._archive.link_new_segments()
            self._restarter.record_memory()
            await asyncio.sleep(WATCH_SECONDS)


async def probe_until(seconds: float, probe: Callable[[], Awaitable[None]]) -> str | None:
    """Probe until there is no UnavailableError: None; the last error's text when ``seconds`` are over."""
    said = "there was no probe"
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    return await probe()
                except UnavailableError as error:
                    said = str(error)
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        return said


def findings(found: RunAudit) -> list[str]:
    """All that an audit found wrong."""
    return [*found.lost, *found.duplicated, *found.unbalanced]
