"""`treegrpo up` and `treegrpo learner`: start, watch, drain, sum up.

checks ─► lock ─► broker ─► retriever ─► intake ─► trainer ─► samplers ─► …the trainer is done… ─► summary
└─ a part dies: it is started again (`part_supervisor.py`), or: draining ─► checkpoint ─► the run ends with the part's reason
└─ Ctrl-C, a closed terminal, or the run state "draining": draining ─► checkpoint ─► how to go on
└─ Ctrl-C again: stop now

The intake sets the run state "draining" also when it gives the run up, so what ended the run is known only when all parts
have ended: a part that ended for a reason that stays is why, whoever asked for the drain.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from learner.intake.persistence.run_lock import lock_run
from services.cli.checks.run_checks import learner_checks, run_checks, up_checks
from services.cli.processes.part_supervisor import Part
from services.cli.processes.process_group import Crew
from services.cli.processes.program import Program
from services.cli.processes.readiness import broker_ready, learner_ready, retriever_ready
from services.cli.reports.live_view import Screen
from services.cli.reports.run_alerts import Troubles
from services.cli.reports.run_history import beginning, is_trained
from services.cli.state import follow_state
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import DeadlineError, PartError, RunError, UnavailableError
from treegrpo.runtime.entrypoint import TRANSIENT
from treegrpo.runtime.run_directory import make_run_directory
from treegrpo.runtime.stop_signals import STOP_SIGNALS, stop_signals
from treegrpo.security.credentials import Credentials
from treegrpo.storage.file_lock import hold_file_lock
from treegrpo.storage.run_files import check_run_files
from treegrpo.wire.control import RunState, publish_state

log = logging.getLogger(__name__)
LOCK = "up.lock"
"""A file in the run's directory."""
DRAIN_SECONDS = 180.0
FAREWELL_SECONDS = 5.0
INTERRUPTED = 130
DRAINED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Codes of a trainer that ended as it was told: by the intake, by a signal in its first moment, by one to several ranks."""

BROKER = Program("broker", "services.broker.server")
RETRIEVER = Program("retriever", "services.retriever")
INTAKE = Program("intake", "learner.intake")
TRAINER = Program("trainer", "learner.trainer")

T = TypeVar("T")


class Interrupts:
    """Ctrl-C and SIGTERM, counted: the first asks for a drain, the second for an immediate stop.

    SIGHUP only asks for a drain: a terminal that closes may send several.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.hit_once = asyncio.Event()
        """Else the run state has asked for the drain."""

    def arm(self) -> None:
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, self.hit if number in STOP_SIGNALS else self.hang_up)

    def hang_up(self) -> None:
        self.hit_once.set()
        self.first.set()

    def hit(self) -> None:
        self.hit_once.set()
        (self.second if self.first.is_set() else self.first).set()


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None when ``event`` came first and ``work`` was cancelled."""
    task, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], name: str) -> AsyncGenerator[None]:
    """Do ``work`` for the time of the block, and no longer; should it break, the log says so, and the block goes on."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_say_broken)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _say_broken(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s broke, and the run goes on without: %s", task.get_name(), error, exc_info=error)


@contextmanager
def only_here(run_dir: Path) -> Generator[None]:
    """Hold the run for the time of the block, before anything is started for it.

    Raises:
        AddressInUseError: another command works on it, or an intake that has a supervisor of its own.
        RunFileError: something else stands where the run keeps its files.
    """
    make_run_directory(run_dir)
    check_run_files(run_dir)
    sentence = f"Another `treegrpo up` or `treegrpo learner` works on the run in {run_dir}; stop it, or set run.dir to another."
    with hold_file_lock(run_dir / LOCK, sentence):
        with lock_run(run_dir):
            pass
        yield


class Run:
    """One run of this machine's processes."""

    def __init__(self, config: Config, arguments: Sequence[str], screen: Screen, go_on: str, *, everything: bool) -> None:
        """Args:
        config: resolved.
        arguments: the same as the processes are told it.
        screen: shows the run.
        go_on: the command that sets a paused run running.
        everything: broker, retriever and samplers too, not the learner alone.
        """
        self._config = config
        self._access = Credentials.from_config(config.security, Role.OPERATOR)
        self._arguments = arguments
        self._screen = screen
        self._go_on = go_on
        self._everything = everything
        self._interrupts = Interrupts()

    async def __call__(self) -> int:
        """Run to the end; returns the exit code. Raises what the checks and the processes say went wrong."""
        await self.check()
        config = self._config
        self._interrupts.arm()
        with only_here(config.run.dir):
            return await self._together()

    async def check(self) -> None:
        """Say what should be known before the start. Raises what is certain to go wrong; nothing has been made or started."""
        config = self._config
        for caution in run_checks((up_checks if self._everything else learner_checks)(config).values()):
            self._screen.say(f"Note: {caution}.")
        if self._everything and config.retriever.url:  # others run it
            await retriever_ready(config, self._access)

    async def _together(self) -> int:
        """The processes, from the first to the last; returns the exit code. Raises why a part ended for good."""
        crew = Crew(self._arguments, self._config.run.dir / "logs", self._screen.say, self._interrupts.second)
        try:
            async with crew:
                code = await self._from_start_to_end(crew)
        except (RunError, DeadlineError) as error:
            raise crew.cause(error) from error
        if (failure := crew.failure()) is not None:  # only when it was stopped did it say so
            raise failure
        return code

    async def _from_start_to_end(self, crew: Crew) -> int:
        config = self._config
        troubles = Troubles(config, self._access, self._screen.say)
        if await unless(self._interrupts.first, self._start(crew)) is None:
            self._screen.say("Stopped before training began.")
            return INTERRUPTED
        async with (
            self._heeding(crew),
            beside(troubles.follow(), "troubles"),
            self._screen.follow(config.run.dir, config.learner.metrics, config.train.steps, self._access),
        ):
            code = await self._watch(crew, troubles)
        if code == 0:
            crew.drain.set()
            await unless(self._interrupts.second, self._goodbye(crew))
        return code

    async def _start(self, crew: Crew) -> bool:
        """Start everything in order; returns True."""
        config, access = self._config, self._access
        broker = partial(broker_ready, config.broker.address, access)
        self._screen.say(f"{beginning(config)}; each process writes its log to {config.run.dir / 'logs'}.")
        if self._everything and config.broker.embedded:
            await crew.start(Part(BROKER, broker))
        else:
            await broker()
        retriever = partial(retriever_ready, config, access)
        if self._everything and not config.retriever.url:
            await crew.start(Part(RETRIEVER, retriever))
        await crew.start(Part(INTAKE, partial(learner_ready, config.learner.listen, access)))
        await crew.start(Part(TRAINER, done=partial(is_trained, config)))
        for number in range(config.sampler.count if self._everything else 0):
            name = f"sampler-{number}"
            crew.add(Part(Program(name, "services.sampler", ("--sampler.id", name))))
        self._screen.say("The model is being loaded; the first line is the held-out exact match of the policy as it is.")
        return True

    @asynccontextmanager
    async def _heeding(self, crew: Crew) -> AsyncGenerator[None]:
        """Follow the run state for the time of the block. The intake has set or confirmed it by now."""

        def heard(state: RunState) -> None:
            self._screen.paused(f"The run is paused; go on with: {self._go_on}" if state is RunState.PAUSED else "")
            if state is RunState.DRAINING and not crew.drain.is_set():
                self._interrupts.first.set()

        async with beside(follow_state(self._config, self._access, heard), "run-state"):
            yield

    async def _watch(self, crew: Crew, troubles: Troubles) -> int:
        """Until the trainer is done, by itself or asked to; returns the exit code.

        Raises PartError or DeadlineError: the run cannot go on. The trainer has left a checkpoint even so.
        """

        async def over() -> bool:
            await crew.watch(TRAINER.name)
            return True

        try:
            if await unless(self._interrupts.first, over()):
                return 0
        except (RunError, DeadlineError):
            if crew.runs(TRAINER.name):
                self._interrupts.first.set()  # from now on Ctrl-C stops at once
                self._screen.say(f"The run has to end: {self._draining}")
                await self._drain(crew, troubles, pass_on=False)
            raise
        if not crew.runs(TRAINER.name):
            crew.drain.set()
            self._screen.say("The trainer was about to be started again; the run goes on from its newest checkpoint.")
            return 0
        self._screen.say(f"Draining: {self._draining}")
        if not await self._drain(crew, troubles, pass_on=True):
            self._interrupts.second.set()
            return INTERRUPTED
        if (trainer := crew.newest(TRAINER.name)).code not in DRAINED:
            raise PartError(trainer.obituary(), is_transient=trainer.code == TRANSIENT)
        return 0

    @property
    def _draining(self) -> str:
        return f"the trainer writes a checkpoint (at most {DRAIN_SECONDS:.0f} s; Ctrl-C again stops at once)."

    async def _drain(self, crew: Crew, troubles: Troubles, *, pass_on: bool) -> bool:
        """Have the trainer leave a checkpoint and end; whether it did in time.

        ``pass_on``: the others, which serve, are told too, and pass it on.
        """
        crew.drain.set()
        told = pass_on and await unless(self._interrupts.second, self._tell(RunState.DRAINING))
        silent = asyncio.Event()  # set when nobody passes it on
        if not told:
            silent.set()

        async def terminate() -> None:
            await silent.wait()
            crew.tell(TRAINER.name, signal.SIGTERM)

        async def no_room() -> None:
            """Whoever presses Ctrl-C does not wait for room; who sets the run state does, as far as the time allows."""
            await self._interrupts.hit_once.wait()
            await troubles.trainer_blocked.wait()
            self._screen.say("The disk has no room for what the trainer has to write, so it ends without.")
            silent.set()

        async def intake_lost() -> None:
            await crew.over(INTAKE.name)
            silent.set()

        async def over() -> bool:
            await crew.over(TRAINER.name)
            return True

        try:
            async with (
                asyncio.timeout(DRAIN_SECONDS),
                beside(terminate(), "terminate"),
                beside(no_room(), "no-room"),
                beside(intake_lost(), "intake-lost"),
            ):
                return bool(await unless(self._interrupts.second, over()))
        except TimeoutError:
            self._screen.say(f"The trainer did not finish within {DRAIN_SECONDS:.0f} s.")
            return False

    async def _goodbye(self, crew: Crew) -> None:
        """Let samplers end in order."""
        await self._tell(RunState.DRAINING)
        await crew.farewell(FAREWELL_SECONDS)

    async def _tell(self, state: RunState) -> bool:
        """Set the run state; a broker that is gone by now must not turn a good end into an error."""
        try:
            await publish_state(self._config.broker.address, self._config.run.name, state, self._access)
        except UnavailableError as error:
            self._screen.say(f"The run state could not be set to {state.value}: {error}")
            return False
        return True
