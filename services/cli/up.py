"""`treegrpo up` and `treegrpo learner`: start, watch, drain, sum up.

checks ─► broker ─► retriever ─► intake ─► trainer ─► samplers ─► …the trainer ends…─► summary
└─ Ctrl-C: draining ─► checkpoint ─► how to resume
└─ Ctrl-C again: stop now
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from services.cli.checks import learner_checks, run_checks, up_checks
from services.cli.crew import Crew
from services.cli.process import Child, Program
from services.cli.ready import broker_ready, learner_ready, retriever_ready
from services.cli.view import Screen
from treegrpo.access import Access
from treegrpo.config import Config
from treegrpo.control import RunState, publish_state
from treegrpo.errors import UnavailableError
from treegrpo.security import Role

DRAIN_SECONDS = 180.0
FAREWELL_SECONDS = 5.0
INTERRUPTED = 130

BROKER = Program("broker", "services.cli.broker")
RETRIEVER = Program("retriever", "services.retriever")
INTAKE = Program("intake", "learner.intake")
TRAINER = Program("trainer", "learner.trainer")

T = TypeVar("T")


class Interrupts:
    """Ctrl-C and SIGTERM, counted: the first asks for a drain, the second for an immediate stop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def arm(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.hit)

    def hit(self) -> None:
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


class Run:
    """One run of this machine's processes."""

    def __init__(self, config: Config, arguments: Sequence[str], screen: Screen, *, everything: bool) -> None:
        """Args:
        config: resolved.
        arguments: the same as the processes are told it.
        screen: shows the run.
        everything: broker, retriever and samplers too, not the learner alone.
        """
        self._config = config
        self._access = Access.of(config.security, Role.OPERATOR)
        self._arguments = arguments
        self._screen = screen
        self._everything = everything
        self._interrupts = Interrupts()

    async def __call__(self) -> int:
        """Run to the end; returns the exit code. Raises what the checks and the processes say went wrong."""
        config = self._config
        run_checks((up_checks if self._everything else learner_checks)(config).values())
        self._interrupts.arm()
        async with Crew(self._arguments, config.run.dir / "logs", self._screen.say) as crew:
            trainer = await unless(self._interrupts.first, self._start(crew))
            if trainer is None:
                self._screen.say("Stopped before training began.")
                return INTERRUPTED
            async with self._screen.follow(config.run.dir, config.learner.metrics, config.train.steps, self._access):
                code = await self._watch(crew, trainer)
            if code == 0:
                await self._tell(RunState.DRAINING)
                await crew.farewell(FAREWELL_SECONDS)
        return code

    async def _start(self, crew: Crew) -> Child:
        """Start everything in order; returns the trainer."""
        config, access = self._config, self._access
        broker = partial(broker_ready, config.broker.address, access)
        self._screen.say(f"Starting the run {config.run.name}; each process writes its log to {config.run.dir / 'logs'}.")
        if self._everything and config.broker.embedded:
            await crew.start(BROKER, broker)
        else:
            await broker()
        await publish_state(config.broker.address, config.run.name, RunState.RUNNING, access)
        if self._everything and not config.retriever.url:
            await crew.start(RETRIEVER, partial(retriever_ready, config.search_url, access))
        elif self._everything:
            await retriever_ready(config.search_url, access)
        await crew.start(INTAKE, partial(learner_ready, config.learner.listen, access))
        trainer = await crew.start(TRAINER)
        for number in range(config.sampler.count if self._everything else 0):
            name = f"sampler-{number}"
            crew.keep(Program(name, "services.sampler", ("--sampler.id", name)))
        self._screen.say("The model is being loaded; the first line is the held-out exact match before training.")
        return trainer

    async def _watch(self, crew: Crew, trainer: Child) -> int:
        """Until the trainer has ended, by itself or asked to; returns the exit code."""

        async def finished() -> bool:
            await crew.watch(trainer)
            return True

        if await unless(self._interrupts.first, finished()):
            return 0
        self._screen.say(
            f"Draining: the trainer writes a checkpoint (at most {DRAIN_SECONDS:.0f} s; Ctrl-C again stops at once)."
        )
        await self._tell(RunState.DRAINING)
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                drained = await unless(self._interrupts.second, finished())
        except TimeoutError:
            self._screen.say(f"The trainer did not finish within {DRAIN_SECONDS:.0f} s.")
            drained = None
        if not drained:
            crew.grace = 0.0
            return INTERRUPTED
        return 0

    async def _tell(self, state: RunState) -> None:
        """Set the run state; a broker that is gone by now must not turn a good end into an error."""
        try:
            await publish_state(self._config.broker.address, self._config.run.name, state, self._access)
        except UnavailableError as error:
            self._screen.say(f"The run state could not be set to {state.value}: {error}")
