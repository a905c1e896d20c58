"""The trainer's client of the intake: takes groups, announces versions, retries while the intake is unreachable.

Every call ends with an answer, a drain or an error. Rank 0 talks; every answer, every error and the request to drain are
broadcast, so that all ranks do the same.

An unreachable intake is retried with back-off, because restarting the trainer costs more. An intake that was restarted knows
what its journal says; the client announces the newest version again before it repeats the request that failed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from learner.trainer.distributed.ranks import SINGLE_RANK, Ranks
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, TreeGrpoError, UnavailableError
from treegrpo.timing.backoff import Backoff, RetrySchedule
from treegrpo.wire.trainer_protocol import (
    Answer,
    Covered,
    Done,
    Evaluate,
    Evaluation,
    IntakeConnection,
    Message,
    Publish,
    StepReport,
    Take,
    Taken,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IntakeRetries:
    """How the client retries an intake that does not answer."""

    connect: Backoff = Backoff((0.1,), seconds=30.0)
    """At the start: the intake is started beside the trainer and may need a moment more."""
    outage: Backoff = Backoff.exponential(0.1, 5.0, seconds=600.0)
    """Later: when it has been in vain, the trainer leaves a checkpoint and ends. Less than the ranks' collective timeout."""


RETRIES = IntakeRetries()


class IntakeClient:
    """Sends requests to the intake, and remembers whether the run is to end. A context manager that disconnects at its end."""

    def __init__(self, path: str, stop: threading.Event, ranks: Ranks, outage: Backoff) -> None:
        self.stop = stop
        """Set by a signal: end as if the run drained. Rank 0's counts."""
        self._path = path
        self._ranks = ranks
        self._outage = outage
        self._connection: IntakeConnection | None = None
        """On rank 0, while the intake answers."""
        self._announced: Publish | None = None
        """The newest version, for an intake that was restarted."""
        self._refused_again = False
        """A restarted intake could not serve that version any more."""
        self.on_version_damaged: Callable[[], None] = lambda: None
        """Called on all ranks when the newest version has to be written and announced again."""
        self.draining = False
        """Whether the run is to end; known since the last answer."""

    @classmethod
    def connect(cls, path: str, stop: threading.Event, ranks: Ranks = SINGLE_RANK, *, retries: IntakeRetries = RETRIES) -> Self:
        """Connect to the intake at ``path``. Raises UnavailableError.

        Args:
            path: its Unix socket.
            stop: set when a signal tells this process to end.
            ranks: those that share its answers.
            retries: how long it may be unreachable at first, and later.
        """
        client = cls(path, stop, ranks, retries.outage)
        ranks.run_on_first(lambda: client._connect(retries.connect))
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()

    def _connect(self, backoff: Backoff) -> None:
        retries = backoff.schedule()
        while self._connection is None:
            try:
                self._connection = IntakeConnection(self._path)
            except UnavailableError:
                if not retries.wait_event(self.stop):
                    raise

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(self, request: Message, kind: type[Answer]) -> Answer:
        """The answer, on every rank. Raises UnavailableError and ContractError."""
        answer, stopped, self._refused_again = self._ranks.run_on_first(
            lambda: (self._request_with_retries(request, kind), self.stop.is_set(), self._refused_again)
        )
        self.draining |= stopped
        if isinstance(answer, TreeGrpoError):
            self._ranks.raise_on_all(answer)
        return answer

    def _request_with_retries(self, request: Message, kind: type[Answer]) -> Answer | TreeGrpoError:
        """The answer, or the error if the run drains, the error is permanent or the retries are used up."""
        retries: RetrySchedule | None = None
        while True:
            try:
                answer = self._reconnect(request).ask(request, kind)
            except UnavailableError as error:
                self._disconnect()
                retries = retries or self._outage.schedule()
                if self.draining or self.stop.is_set() or retries.remaining <= 0:
                    return error
                if retries.log_is_due():
                    log.warning("%s The trainer waits for it. Trying again for up to %.0f s.", error, retries.remaining)
                if not retries.wait_event(self.stop):
                    return error
            except TreeGrpoError as error:
                return error
            else:
                if retries is not None:
                    log.info("the intake is back after %.0f s", retries.elapsed)
                return answer

    def _reconnect(self, request: Message) -> IntakeConnection:
        """The connection. A new one announces the newest version first, unless ``request`` does that."""
        if self._connection is None:
            self._connection = IntakeConnection(self._path)
            if self._announced is not None and not isinstance(request, Publish):
                try:
                    self._connection.ask(self._announced, Done)
                except ContractError as error:
                    log.warning("%s", error)
                    self._refused_again = True
        return self._connection

    def take_groups(self, position: int, count: int) -> list[bytes]:
        """The next groups after ``position``, packed; empty when the run drains. Blocks while the run is paused."""
        while not self.draining:
            taken = self._request(Take(position, count), Taken)
            self._rewrite_if_damaged(taken.damaged)
            if taken.groups:
                return taken.groups
            self.draining |= taken.state == "draining"
        return []

    def await_evaluation(self, version: PolicyVersion) -> Evaluation | None:
        """The evaluation of an announced version; None when the run drains before it is done."""
        while not self.draining:
            result = self._request(Evaluate(str(version)), Evaluation)
            self._rewrite_if_damaged(result.damaged)
            if result.done:
                return result
            self.draining |= result.state == "draining"
        return None

    def _rewrite_if_damaged(self, damaged: str) -> None:
        """Write the newest version again if the intake found it ``damaged``. All ranks call it."""
        if self._announced is not None and (self._refused_again or damaged == self._announced.version):
            log.warning("version %s was damaged after it was published; the trainer writes it again", self._announced.version)
            self._refused_again = False
            self.on_version_damaged()

    def request_publish(self, version: PolicyVersion, folder: Path, position: int) -> None:
        """Have the intake serve ``folder`` as ``version``; it is trained on the groups before ``position``."""
        self._announced = Publish(str(version), str(folder.absolute()), position)
        self._request(self._announced, Done)

    def confirm_checkpoint(self, position: int) -> None:
        """Tell the intake that a checkpoint has trained the groups before ``position``."""
        self._request(Covered(position), Done)

    def report_step(self, values: dict[str, Any]) -> None:
        """Send rank 0's record for the run's progress file; the intake drops duplicates."""
        self._request(StepReport(values), Done)
