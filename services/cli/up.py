"""`treegrpo up` and `treegrpo learner`: check, start, supervise, drain, sum up.

checks ─► lock ─► broker ─► retriever ─► intake ─► trainer ─► samplers ─► …the trainer is done… ─► summary
└─ a part dies: it is restarted (`part_supervisor.py`), or: draining ─► checkpoint ─► the run ends with the part's error
└─ Ctrl-C, a closed terminal, or the run state "draining": draining ─► checkpoint ─► how to continue
└─ Ctrl-C again: stop now

The intake also sets the run state "draining" when it gives the run up, so the reason for the end is known only when all parts
have ended: it is a part's permanent error, if there is one, also after a drain that the user requested.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from learner.intake.persistence.run_lock import lock_run
from services.cli.checks.check import run_checks
from services.cli.checks.run_checks import learner_checks, up_checks
from services.cli.processes.part_supervisor import RESTARTS, SupervisedPart
from services.cli.processes.process_group import ProcessGroup
from services.cli.processes.program import Program
from services.cli.processes.readiness import probe_broker, probe_learner, probe_retriever
from services.cli.reports.live_view import LiveView
from services.cli.reports.run_alerts import RunAlerts
from services.cli.reports.run_history import describe_start, is_trained
from services.cli.state import follow_run_state
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import DeadlineError, PartError, RunError, UnavailableError
from treegrpo.runtime.entrypoint import TRANSIENT
from treegrpo.runtime.run_directory import make_run_directory
from treegrpo.runtime.stop_signals import STOP_SIGNALS, stop_signals
from treegrpo.runtime.supervisor import RestartPolicy
from treegrpo.security.credentials import Credentials
from treegrpo.storage.file_lock import hold_file_lock
from treegrpo.storage.run_files import check_run_files
from treegrpo.wire.control import RunState, publish_state

log = logging.getLogger(__name__)
LOCK = "up.lock"
"""A file in the run's directory."""
DRAIN_SECONDS = 180.0
SAMPLER_EXIT_SECONDS = 5.0
INTERRUPTED = 130
DRAINED_CODES = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a trainer that was drained: by the intake, by a signal in its first moment, by one to several ranks."""

T = TypeVar("T")


BROKER = Program("broker", "services.broker.server")
RETRIEVER = Program("retriever", "services.retriever")
INTAKE = Program("intake", "learner.intake")
TRAINER = Program("trainer", "learner.trainer")


@dataclass(frozen=True, slots=True)
class RunPrograms:
    """The programs of a run's parts. The defaults are what runs use; tests set small ones."""

    broker: Program = BROKER
    retriever: Program = RETRIEVER
    intake: Program = INTAKE
    trainer: Program = TRAINER

    def sampler(self, number: int) -> Program:
        name = f"sampler-{number}"
        return Program(name, "services.sampler", ("--sampler.id", name))


PROGRAMS = RunPrograms()


class InterruptSignals:
    """Counts Ctrl-C and SIGTERM: the first requests a drain, the second an immediate stop.

    SIGHUP only requests a drain: a terminal that closes may send several.
    """

    def __init__(self) -> None:
        self.drain_requested = asyncio.Event()
        self.stop_requested = asyncio.Event()
        self.received = asyncio.Event()
        """Set by a signal; unset when the run state alone has requested the drain."""

    def install_handlers(self) -> None:
        for number in stop_signals():
            handler = self.on_interrupt if number in STOP_SIGNALS else self.on_hangup
            asyncio.get_running_loop().add_signal_handler(number, handler)

    def on_hangup(self) -> None:
        self.received.set()
        self.drain_requested.set()

    def on_interrupt(self) -> None:
        self.received.set()
        (self.stop_requested if self.drain_requested.is_set() else self.drain_requested).set()


async def run_unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
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
async def background_task(work: Coroutine[Any, Any, None], name: str) -> AsyncGenerator[None]:
    """Run ``work`` for the time of the block; an exception in it is logged, and the block continues."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the task %s failed; the run continues without it: %s", task.get_name(), error, exc_info=error)


@contextmanager
def lock_run_for_command(run_dir: Path) -> Generator[None]:
    """Hold the lock of a run directory for the time of the block, before anything is started for the run.

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


class RunController:
    """Starts the processes of one run on this machine, supervises them, and ends them."""

    def __init__(
        self,
        config: Config,
        arguments: Sequence[str],
        view: LiveView,
        resume_command: str,
        *,
        everything: bool,
        programs: RunPrograms = PROGRAMS,
        policy: RestartPolicy = RESTARTS,
    ) -> None:
        """Args:
        config: resolved.
        arguments: the same configuration, as the processes get it.
        view: shows the run.
        resume_command: the command that resumes a paused run.
        everything: broker, retriever and samplers too, not the learner alone.
        programs: of the parts.
        policy: when parts are restarted.
        """
        self._config = config
        self._access = Credentials.from_config(config.security, Role.OPERATOR)
        self._arguments = arguments
        self._view = view
        self._resume_command = resume_command
        self._everything = everything
        self._programs = programs
        self._policy = policy
        self._signals = InterruptSignals()

    async def __call__(self) -> int:
        """Run to the end; returns the exit code. Raises what the checks and the processes report."""
        await self.check_configuration()
        config = self._config
        self._signals.install_handlers()
        with lock_run_for_command(config.run.dir):
            return await self._run_processes()

    async def check_configuration(self) -> None:
        """Print warnings about the configuration. Raises what is certain to fail; nothing has been made or started."""
        config = self._config
        for warning in run_checks((up_checks if self._everything else learner_checks)(config).values()):
            self._view.print_line(f"Note: {warning}.")
        if self._everything and config.retriever.url:  # others run it
            await probe_retriever(config, self._access)

    async def _run_processes(self) -> int:
        """Run the processes; returns the exit code. Raises why a part ended for good."""
        logs = self._config.run.dir / "logs"
        group = ProcessGroup(self._arguments, logs, self._view.print_line, self._signals.stop_requested, self._policy)
        try:
            async with group:
                code = await self._run_to_end(group)
        except (RunError, DeadlineError) as error:
            raise group.root_cause(error) from error
        if (failure := group.permanent_failure()) is not None:  # it reported it only when it was stopped
            raise failure
        return code

    async def _run_to_end(self, group: ProcessGroup) -> int:
        config = self._config
        alerts = RunAlerts(config, self._access, self._view.print_line)
        if await run_unless(self._signals.drain_requested, self._start_parts(group)) is None:
            self._view.print_line("Stopped before training began.")
            return INTERRUPTED
        async with (
            self._following_run_state(group),
            background_task(alerts.follow_metrics(), "run-alerts"),
            self._view.follow_run(config.run.dir, config.learner.metrics, config.train.steps, self._access),
        ):
            code = await self._supervise_until_done(group, alerts)
        if code == 0:
            group.draining.set()
            await run_unless(self._signals.stop_requested, self._drain_samplers(group))
        return code

    async def _start_parts(self, group: ProcessGroup) -> bool:
        """Start all parts in order; returns True."""
        config, access, programs = self._config, self._access, self._programs
        broker = partial(probe_broker, config.broker.address, access)
        self._view.print_line(f"{describe_start(config)}; each process writes its log to {config.run.dir / 'logs'}.")
        if self._everything and config.broker.embedded:
            await group.start_part(SupervisedPart(programs.broker, broker))
        else:
            await broker()
        if self._everything and not config.retriever.url:
            await group.start_part(SupervisedPart(programs.retriever, partial(probe_retriever, config, access)))
        await group.start_part(SupervisedPart(programs.intake, partial(probe_learner, config.learner.listen, access)))
        await group.start_part(SupervisedPart(programs.trainer, is_done=partial(is_trained, config)))
        for number in range(config.sampler.count if self._everything else 0):
            group.add_sampler(SupervisedPart(programs.sampler(number)))
        self._view.print_line("The model is being loaded; the first line is the held-out exact match of the policy as it is.")
        return True

    @asynccontextmanager
    async def _following_run_state(self, group: ProcessGroup) -> AsyncGenerator[None]:
        """Follow the run state for the time of the block. The intake has set or confirmed it by now."""

        def on_state(state: RunState) -> None:
            paused = f"The run is paused; go on with: {self._resume_command}" if state is RunState.PAUSED else ""
            self._view.show_paused(paused)
            if state is RunState.DRAINING and not group.draining.is_set():
                self._signals.drain_requested.set()

        async with background_task(follow_run_state(self._config, self._access, on_state), "run-state"):
            yield

    async def _supervise_until_done(self, group: ProcessGroup, alerts: RunAlerts) -> int:
        """Return the exit code when the trainer is done, by itself or drained.

        Raises PartError or DeadlineError: the run cannot continue. The trainer has left a checkpoint even so.
        """
        trainer = self._programs.trainer.name

        async def trainer_done() -> bool:
            await group.wait_for_part(trainer)
            return True

        try:
            if await run_unless(self._signals.drain_requested, trainer_done()):
                return 0
        except (RunError, DeadlineError):
            if group.is_running(trainer):
                self._signals.drain_requested.set()  # from now on Ctrl-C stops at once
                self._view.print_line(f"The run has to end: {self._draining}")
                await self._drain_trainer(group, alerts, broadcast=False)
            raise
        if not group.is_running(trainer):
            group.draining.set()
            self._view.print_line("The trainer was about to be started again; the run continues from its newest checkpoint.")
            return 0
        self._view.print_line(f"Draining: {self._draining}")
        if not await self._drain_trainer(group, alerts, broadcast=True):
            self._signals.stop_requested.set()
            return INTERRUPTED
        if (process := group.newest_process(trainer)).code not in DRAINED_CODES:
            raise PartError(process.describe_exit(), is_transient=process.code == TRANSIENT)
        return 0

    @property
    def _draining(self) -> str:
        return f"the trainer writes a checkpoint (at most {DRAIN_SECONDS:.0f} s; Ctrl-C again stops at once)."

    async def _drain_trainer(self, group: ProcessGroup, alerts: RunAlerts, *, broadcast: bool) -> bool:
        """Have the trainer write a checkpoint and end; whether it did in time.

        ``broadcast``: by the run state, which the intake passes on to it. If the intake is gone, the trainer gets a signal.
        """
        group.draining.set()
        published = broadcast and await run_unless(self._signals.stop_requested, self._set_run_state(RunState.DRAINING))
        signal_trainer = asyncio.Event()
        if not published:
            signal_trainer.set()

        async def terminate() -> None:
            await signal_trainer.wait()
            group.signal_part(self._programs.trainer.name, signal.SIGTERM)

        async def on_full_disk() -> None:
            """Stop the trainer when the disk is full after Ctrl-C; after a drain by run state it waits up to the time limit."""
            await self._signals.received.wait()
            await alerts.trainer_blocked.wait()
            self._view.print_line("The disk has no room for what the trainer has to write, so it ends without.")
            signal_trainer.set()

        async def on_intake_end() -> None:
            await group.wait_for_end_of_part(self._programs.intake.name)
            signal_trainer.set()

        async def trainer_ended() -> bool:
            await group.wait_for_end_of_part(self._programs.trainer.name)
            return True

        try:
            async with (
                asyncio.timeout(DRAIN_SECONDS),
                background_task(terminate(), "terminate"),
                background_task(on_full_disk(), "full-disk"),
                background_task(on_intake_end(), "intake-end"),
            ):
                return bool(await run_unless(self._signals.stop_requested, trainer_ended()))
        except TimeoutError:
            self._view.print_line(f"The trainer did not finish within {DRAIN_SECONDS:.0f} s.")
            return False

    async def _drain_samplers(self, group: ProcessGroup) -> None:
        """Have the samplers finish their leases and end."""
        await self._set_run_state(RunState.DRAINING)
        await group.wait_for_samplers(SAMPLER_EXIT_SECONDS)

    async def _set_run_state(self, state: RunState) -> bool:
        """Publish the run state; returns whether it succeeded. A broker that is gone must not turn a good end into an error."""
        try:
            await publish_state(self._config.broker.address, self._config.run.name, state, self._access)
        except UnavailableError as error:
            self._view.print_line(f"The run state could not be set to {state.value}: {error}")
            return False
        return True
