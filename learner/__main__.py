"""The whole learner, intake and trainer: ``python -m learner [CONFIG.toml] [--section.key value …]``, or of several ranks

    torchrun --nproc-per-node=2 -m learner CONFIG.toml

Rank 0 starts the intake, unless one already serves this run, and stops it after the trainer. It restarts an intake that fails,
and the trainer waits for that. A broker must answer at broker.address (`treegrpo broker`), and samplers come from elsewhere
(`treegrpo sampler`). `treegrpo learner` does the same with a process, a log file and a screen for each.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from learner.trainer.distributed.rank_launcher import run
from learner.trainer.distributed.ranks import Ranks
from learner.trainer.loop import main
from treegrpo.config.schema import Config
from treegrpo.errors import DeadlineError, PartError, TreeGrpoError, UnavailableError
from treegrpo.net.local_socket import socket_path
from treegrpo.runtime.entrypoint import FAILED
from treegrpo.runtime.exit_report import ExitReports, decisive_report
from treegrpo.runtime.parent_death import parent_bound_command
from treegrpo.runtime.process_environment import child_environment, python_command
from treegrpo.runtime.supervisor import Ended, RestartPolicy, Supervisor
from treegrpo.timing.backoff import Backoff
from treegrpo.wire.trainer_protocol import IntakeConnection

log = logging.getLogger(__name__)
READY = Backoff((0.1,), seconds=300.0)
"""Polls of a started intake until it serves. Reading a long journal takes minutes."""
GRACE_SECONDS = 30.0
"""The intake closes open leases in 20."""
RESTARTS = RestartPolicy(Backoff((2.0,)))
"""Without a limit: the trainer gives up after `intake_client.IntakeRetries`, and the restarts end with it."""


def learn(config: Config, ranks: Ranks) -> None:
    """Train beside an intake of this run. Raises TreeGrpoError."""
    with running_intake(config, ranks):
        main(config, ranks)


@contextmanager
def running_intake(config: Config, ranks: Ranks) -> Generator[None]:
    """Run an intake for the time of the block.

    Raises:
        PartError: it ended with a permanent error, which replaces any error of the block; or it ended before it served.
        DeadlineError: it is not ready in time.
    """
    path = socket_path(config.run.dir)
    command = python_command("learner.intake", *sys.argv[1:])
    child = IntakeChild(command) if ranks.is_first and not _is_served(path) else None
    try:
        ranks.run_on_first(lambda: _wait_until_ready(child, path))
        supervisor = IntakeSupervisor(child) if child is not None else None
    except BaseException:
        if child is not None:
            child.stop()
        raise
    try:
        yield
    except TreeGrpoError as error:  # for instance: the intake does not answer
        if supervisor is not None:
            supervisor.stop()
            supervisor.raise_permanent_error(error)
        raise
    finally:
        if supervisor is not None:
            supervisor.stop()
    ranks.run_on_first(lambda: supervisor and supervisor.raise_permanent_error())


class IntakeChild:
    """The intake's process and its exit reports. It has its own session: Ctrl-C reaches only the trainer, which then stops it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.reports = ExitReports()
        environment = child_environment(self.reports.environment)
        self.process = subprocess.Popen(parent_bound_command(command), start_new_session=True, env=environment)  # noqa: S603

    def exit_sentence(self) -> str:
        """How it ended, and why."""
        report = decisive_report(self.reports.read())
        why = report.sentence if report else "it reported no reason; its output is above"
        return f"The intake ended with code {self.code}: {why}"

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs; negative after a signal, unless an error had been reported before."""
        return self.reports.exit_code(self.process.poll())

    def stop(self) -> None:
        """Stop it, if it runs."""
        self.process.terminate()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class IntakeSupervisor:
    """Restarts the intake when it fails. When it ends well or with a permanent error, ends the trainer by a signal too."""

    def __init__(self, child: IntakeChild) -> None:
        self._child = child
        self._started = True
        """Whether `_run_once` has a running child to wait for, instead of starting one."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="intake-supervisor", daemon=True)
        self._thread.start()

    def _supervise(self) -> None:
        supervisor = Supervisor(RESTARTS, lambda why, delay: log.warning("%s; it is started again in %.0f s", why, delay))
        supervisor.supervise_blocking(self._run_once, self._stopping)
        if not self._stopping.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def _run_once(self) -> Ended | None:
        if not self._started:
            self._child = IntakeChild(self._child.command)  # it is killed when this thread ends, which waits for it
            if self._stopping.is_set():  # `stop` has stopped the child before this one
                self._child.stop()
        self._started = False
        self._child.process.wait()
        return None if self._child.code in (0, FAILED) else Ended(self._child.exit_sentence())

    def stop(self) -> None:
        """Stop the intake, if it runs."""
        self._stopping.set()
        self._child.stop()
        self._thread.join()

    def raise_permanent_error(self, error: TreeGrpoError | None = None) -> None:
        """Raise PartError, from ``error``, if the intake ended with a permanent error."""
        if self._child.code == FAILED:
            raise PartError(self._child.exit_sentence()) from error


def _is_served(path: str) -> bool:
    try:
        IntakeConnection(path).close()
    except UnavailableError:
        return False
    return True


def _wait_until_ready(child: IntakeChild | None, path: str) -> None:
    retries = READY.schedule()
    while child is not None and not _is_served(path):
        if (code := child.code) is not None:
            raise PartError(child.exit_sentence(), is_transient=code != FAILED)
        if (delay := retries.next_delay()) is None:
            raise DeadlineError(f"The intake was not ready within {READY.seconds:.0f} s; see its log.")
        time.sleep(delay)


if __name__ == "__main__":
    sys.exit(run(learn, "learner"))
