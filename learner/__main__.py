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

from learner.trainer.launch import run
from learner.trainer.loop import main
from learner.trainer.ranks import Ranks
from treegrpo.config import Config
from treegrpo.edge import FAILED
from treegrpo.errors import DeadlineError, RunError, UnavailableError
from treegrpo.handoff import IntakeClient, socket_path
from treegrpo.leash import leashed
from treegrpo.process_environment import child_environment, python

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
        RunError: it ended for a reason that stays.
        UnavailableError: it ended at once, for one that may pass.
        DeadlineError: it is not ready in time.
    """
    path = socket_path(config.run.dir)
    own = _start() if ranks.is_first and not _serves(path) else None
    try:
        ranks.first(lambda: _wait(own, path))
        keeper = _Keeper(own) if own is not None else None
    except BaseException:
        if own is not None:
            _end(own)
        raise
    try:
        yield
    finally:
        if keeper is not None:
            keeper.end()
    ranks.first(lambda: keeper and keeper.check())


class _Keeper:
    """Starts the intake again when it dies. When it has ended well or for good, the trainer is told to end too."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="intake-keeper", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while (code := self._process.wait()) not in (0, FAILED) and not self._leaving.is_set():
            log.warning("the intake ended with code %d and is started again in %.0f s", code, RESTART_SECONDS)
            if self._leaving.wait(RESTART_SECONDS):
                return
            self._process = _start()  # it dies with this thread, which lives as long as it does
        if not self._leaving.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """End the intake, if it runs."""
        self._leaving.set()
        _end(self._process)
        self._thread.join()

    def check(self) -> None:
        """Raise RunError if the intake ended for a reason that stays."""
        if self._process.returncode == FAILED:
            raise RunError(f"The intake ended with code {FAILED}, and the trainer with it; the intake's last words are above.")


def _start() -> subprocess.Popen[bytes]:
    """Its own session: a Ctrl-C reaches the trainer alone, which then ends it in order."""
    command = leashed(python("learner.intake", *sys.argv[1:]))
    return subprocess.Popen(command, start_new_session=True, env=child_environment())  # noqa: S603


def _serves(path: str) -> bool:
    try:
        IntakeClient(path).close()
    except UnavailableError:
        return False
    return True


def _wait(own: subprocess.Popen[bytes] | None, path: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while own is not None and not _serves(path):
        if own.poll() is not None:
            kind = RunError if own.returncode == FAILED else UnavailableError
            raise kind(f"The intake ended with code {own.returncode} before it served; its last words are above.")
        if time.monotonic() > deadline:
            raise DeadlineError(f"The intake was not ready within {READY_SECONDS:.0f} s; see what it logged.")
        time.sleep(RETRY_SECONDS)


def _end(own: subprocess.Popen[bytes]) -> None:
    own.terminate()
    try:
        own.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        own.kill()
        own.wait()


if __name__ == "__main__":
    sys.exit(run(learn, "learner"))
