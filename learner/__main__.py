"""The whole learner, intake and trainer: ``python -m learner [CONFIG.toml] [--section.key value …]``, or of several ranks

    torchrun --nproc-per-node=2 -m learner CONFIG.toml

Rank 0 starts the intake, unless one already serves this run, and ends it after the trainer. If it dies it is started again,
and the trainer waits for it. A broker must answer at
broker.address (`treegrpo broker`), and samplers come from elsewhere (`treegrpo sampler`). `treegrpo learner` does the same
with a process, a log file and a screen for each.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from learner.trainer.distributed.rank_launcher import run
from learner.trainer.distributed.ranks import Ranks
from learner.trainer.loop import main
from treegrpo.config.schema import Config
from treegrpo.errors import DeadlineError, PartError, TreeGrpoError, UnavailableError
from treegrpo.runtime.entrypoint import FAILED
from treegrpo.runtime.exit_report import ExitReports, most_telling, reported_code
from treegrpo.runtime.parent_death import leashed
from treegrpo.runtime.process_environment import child_environment, python
from treegrpo.wire.trainer_protocol import IntakeClient, socket_path

log = logging.getLogger(__name__)
READY_SECONDS = 300.0
GRACE_SECONDS = 30.0
"""The intake closes open leases in 20."""
RETRY_SECONDS = 0.1
RESTART_SECONDS = 2.0
"""How often it is in vain, the trainer says, which waits no longer than `link.AWAY_SECONDS`."""


def learn(config: Config, ranks: Ranks) -> None:
    """Train beside an intake of this run. Raises TreeGrpoError."""
    with intake(config, ranks):
        main(config, ranks)


@contextmanager
def intake(config: Config, ranks: Ranks) -> Generator[None]:
    """An intake for the time of the block.

    Raises:
        PartError: it ended for a reason that stays, which goes before any error of the block; or before it served.
        DeadlineError: it is not ready in time.
    """
    path = socket_path(config.run.dir)
    own = _Intake() if ranks.is_first and not _serves(path) else None
    try:
        ranks.first(lambda: _wait(own, path))
        keeper = _Keeper(own) if own is not None else None
    except BaseException:
        if own is not None:
            own.end()
        raise
    try:
        yield
    except TreeGrpoError as error:  # such as that the intake is away
        if keeper is not None:
            keeper.end()
            keeper.check(error)
        raise
    finally:
        if keeper is not None:
            keeper.end()
    ranks.first(lambda: keeper and keeper.check())


class _Intake:
    """An intake's process, with what it reports. Its own session: a Ctrl-C reaches the trainer alone, which ends it in order."""

    def __init__(self) -> None:
        self._reports = ExitReports()
        command = leashed(python("learner.intake", *sys.argv[1:]))
        environment = child_environment(self._reports.environment)
        self.process = subprocess.Popen(command, start_new_session=True, env=environment)  # noqa: S603

    def obituary(self) -> str:
        """How it ended, and why."""
        report = most_telling(self._reports.read())
        why = report.sentence if report else "it gave no reason, but its last words are above"
        return f"The intake ended with code {self.code}: {why}"

    @property
    def code(self) -> int | None:
        """As `reported_code`; None while it runs."""
        return reported_code(self.process.returncode, self._reports)

    def end(self) -> None:
        """End it, if it runs."""
        self.process.terminate()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Keeper:
    """Starts the intake again when it dies. When it has ended well or for good, the trainer is told to end too."""

    def __init__(self, own: _Intake) -> None:
        self._own = own
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="intake-keeper", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while self._own.process.wait() not in (0, FAILED) and not self._leaving.is_set():
            log.warning("%s; it is started again in %.0f s", self._own.obituary(), RESTART_SECONDS)
            if self._leaving.wait(RESTART_SECONDS):
                return
            self._own = _Intake()  # it dies with this thread, which lives as long as it does
            if self._leaving.is_set():  # `end` has met the one before
                self._own.end()
        if not self._leaving.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """End the intake, if it runs."""
        self._leaving.set()
        self._own.end()
        self._thread.join()

    def check(self, error: TreeGrpoError | None = None) -> None:
        """Raise PartError, from ``error``, if the intake ended for a reason that stays."""
        if self._own.code == FAILED:
            raise PartError(self._own.obituary()) from error


def _serves(path: str) -> bool:
    try:
        IntakeClient(path).close()
    except UnavailableError:
        return False
    return True


def _wait(own: _Intake | None, path: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while own is not None and not _serves(path):
        if (code := own.process.poll()) is not None:
            raise PartError(own.obituary(), passes=code != FAILED)
        if time.monotonic() > deadline:
            raise DeadlineError(f"The intake was not ready within {READY_SECONDS:.0f} s; see what it logged.")
        time.sleep(RETRY_SECONDS)


if __name__ == "__main__":
    sys.exit(run(learn, "learner"))
