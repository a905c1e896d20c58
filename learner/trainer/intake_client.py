"""The trainer's side of the conversation with the intake: every wait ends with groups, a drain or an error.

Rank 0 talks; every answer, every error and the wish to drain are shared, so that all ranks do the same.

An intake that is away is waited for, because to start the trainer again costs more. One that comes back knows what its
journal says; which version is the newest it hears from here, before it is asked again what it could not answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from learner.trainer.distributed.ranks import ALONE, Ranks
from learner.trainer.patience import Patience
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, TreeGrpoError, UnavailableError
from treegrpo.wire.trainer_protocol import (
    Answer,
    Covered,
    Done,
    Evaluate,
    Evaluation,
    IntakeClient,
    Message,
    Publish,
    StepReport,
    Take,
    Taken,
)

log = logging.getLogger(__name__)
CONNECT_SECONDS = 30.0
"""The intake is started beside the trainer and may need a moment more."""
AWAY_SECONDS = 600.0
"""The longest that an intake may be away from a trainer at work, which then leaves a checkpoint and ends. Less than the other
ranks' patience."""
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 5.0


class Link:
    """Asks the intake and remembers whether the run is to end."""

    def __init__(self, path: str, stop: threading.Event, ranks: Ranks, away: float) -> None:
        self.stop = stop
        """Set by a signal: end as if the run drained. Rank 0's counts."""
        self._path = path
        self._ranks = ranks
        self._away = away
        self._client: IntakeClient | None = None
        """On rank 0, while the intake is there."""
        self._published: Publish | None = None
        """The newest version, for an intake that comes back."""
        self._unserved = False
        """It came back and could not serve that any more."""
        self.on_damaged: Callable[[], None] = lambda: None
        """Called on all ranks when the newest version has to be written and published again."""
        self.draining = False
        """Known since the last answer."""

    @classmethod
    def open(
        cls,
        path: str,
        stop: threading.Event,
        ranks: Ranks = ALONE,
        *,
        seconds: float = CONNECT_SECONDS,
        away: float = AWAY_SECONDS,
    ) -> Self:
        """Connect to the intake at ``path``.

        Args:
            path: its Unix socket.
            stop: set when a signal tells this process to end.
            ranks: those that share what it says.
            seconds: how long it may take to be there at first; afterwards UnavailableError is raised.
            away: how long it may be away later.
        """
        link = cls(path, stop, ranks, away)
        ranks.first(lambda: link._connect(seconds))
        return link

    def _connect(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._client is None:
            try:
                self._client = IntakeClient(self._path)
            except UnavailableError:
                if self.stop.wait(FIRST_RETRY_SECONDS) or time.monotonic() > deadline:
                    raise

    def _ask(self, request: Message, kind: type[Answer]) -> Answer:
        """The answer, on every rank. Raises UnavailableError and ContractError."""
        answer, told, self._unserved = self._ranks.first(
            lambda: (self._exchange(request, kind), self.stop.is_set(), self._unserved)
        )
        self.draining |= told
        if isinstance(answer, TreeGrpoError):
            self._ranks.raise_alike(answer)
        return answer

    def _exchange(self, request: Message, kind: type[Answer]) -> Answer | TreeGrpoError:
        """The answer, of an intake that may be away meanwhile; an error together with whether a drain explains it."""
        patience: Patience | None = None
        while True:
            try:
                answer = self._reached(request).ask(request, kind)
            except UnavailableError as error:
                self.close()
                patience = patience or Patience(self._away, self.stop, first=FIRST_RETRY_SECONDS, longest=LONGEST_RETRY_SECONDS)
                if self.draining or not patience.wait(f"{error} The trainer waits for it."):
                    return error
            except TreeGrpoError as error:
                return error
            else:
                if patience is not None:
                    log.info("the intake is back after %.0f s", patience.waited)
                return answer

    def _reached(self, request: Message) -> IntakeClient:
        """The intake. If it was away, it knows the newest version again, unless ``request`` is just to say that."""
        if self._client is None:
            self._client = IntakeClient(self._path)
            if self._published is not None and not isinstance(request, Publish):
                try:
                    self._client.ask(self._published, Done)
                except ContractError as error:
                    log.warning("%s", error)
                    self._unserved = True
        return self._client

    def take(self, position: int, count: int) -> list[bytes]:
        """The next groups after ``position``, packed; empty when the run drains. A paused run is waited out."""
        while not self.draining:
            taken = self._ask(Take(position, count), Taken)
            self._mend(taken.damaged)
            if taken.groups:
                return taken.groups
            self.draining |= taken.state == "draining"
        return []

    def evaluate(self, version: PolicyVersion) -> Evaluation | None:
        """The evaluation of a published version, None when the run drains before it is done."""
        while not self.draining:
            result = self._ask(Evaluate(str(version)), Evaluation)
            self._mend(result.damaged)
            if result.done:
                return result
            self.draining |= result.state == "draining"
        return None

    def _mend(self, damaged: str) -> None:
        """Write the newest version again if its files were ``damaged`` since. On all ranks alike."""
        if self._published is not None and (self._unserved or damaged == self._published.version):
            log.warning("version %s was damaged after it was published, and is written again", self._published.version)
            self._unserved = False
            self.on_damaged()

    def publish(self, version: PolicyVersion, folder: Path, position: int) -> None:
        """Have ``folder`` served as ``version``; the groups before ``position`` made it."""
        self._published = Publish(str(version), str(folder.absolute()), position)
        self._ask(self._published, Done)

    def covered(self, position: int) -> None:
        """A checkpoint stands that has trained the groups before ``position``."""
        self._ask(Covered(position), Done)

    def report(self, values: dict[str, Any]) -> None:
        """Have rank 0's record in the run's progress file; one that is there already is not written again."""
        self._ask(StepReport(values), Done)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
