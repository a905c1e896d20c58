"""The trainer's side of the conversation with the intake: every wait ends with groups, a drain or an error.

Rank 0 talks; every answer, every error and the wish to drain are shared, so that all ranks do the same.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Self

from learner.trainer.ranks import ALONE, Ranks
from treegrpo.errors import TreeGrpoError, UnavailableError
from treegrpo.handoff import (
    Answer,
    Covered,
    Done,
    Evaluate,
    Evaluation,
    IntakeClient,
    Message,
    Publish,
    Report,
    Take,
    Taken,
)
from treegrpo.step import PolicyVersion

CONNECT_SECONDS = 30.0
"""The intake is started beside the trainer and may need a moment more."""
RETRY_SECONDS = 0.1


class Link:
    """Asks the intake and remembers whether the run is to end."""

    def __init__(self, stop: threading.Event, ranks: Ranks) -> None:
        self._stop = stop
        """Set by a signal: end as if the run drained. Rank 0's counts."""
        self._ranks = ranks
        self._client: IntakeClient | None = None
        """On rank 0."""
        self.draining = False
        """Known since the last answer."""

    @classmethod
    def open(cls, path: str, stop: threading.Event, ranks: Ranks = ALONE, seconds: float = CONNECT_SECONDS) -> Self:
        """Connect to the intake at ``path``. Raises UnavailableError when nobody listens for ``seconds``."""
        link = cls(stop, ranks)
        ranks.first(lambda: link._connect(path, seconds))
        return link

    def _connect(self, path: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._client is None:
            try:
                self._client = IntakeClient(path)
            except UnavailableError:
                if self._stop.wait(RETRY_SECONDS) or time.monotonic() > deadline:
                    raise

    def _ask(self, request: Message, kind: type[Answer]) -> Answer:
        """The answer, on every rank. Raises UnavailableError and ContractError."""
        answer, told = self._ranks.first(lambda: (self._exchange(request, kind), self._stop.is_set()))
        self.draining |= told
        if isinstance(answer, TreeGrpoError):
            self._ranks.raise_alike(answer)
        return answer

    def _exchange(self, request: Message, kind: type[Answer]) -> Answer | TreeGrpoError:
        assert self._client is not None  # noqa: S101  # rank 0
        try:
            return self._client.ask(request, kind)
        except TreeGrpoError as error:  # together with whether a drain explains it
            return error

    def take(self, position: int, count: int) -> list[bytes]:
        """The next groups after ``position``, packed; empty when the run drains. A paused run is waited out."""
        while not self.draining:
            taken = self._ask(Take(position, count), Taken)
            if taken.groups:
                return taken.groups
            self.draining |= taken.state == "draining"
        return []

    def evaluate(self, version: PolicyVersion) -> Evaluation | None:
        """The evaluation of a published version, None when the run drains before it is done."""
        while not self.draining:
            result = self._ask(Evaluate(str(version)), Evaluation)
            if result.done:
                return result
            self.draining |= result.state == "draining"
        return None

    def publish(self, version: PolicyVersion, folder: Path, position: int) -> None:
        """Have ``folder`` served as ``version``; the groups before ``position`` made it."""
        self._ask(Publish(str(version), str(folder.absolute()), position), Done)

    def covered(self, position: int) -> None:
        """A checkpoint stands that has trained the groups before ``position``."""
        self._ask(Covered(position), Done)

    def report(self, values: dict[str, Any]) -> None:
        """Add rank 0's record to the run's progress file."""
        self._ask(Report(values), Done)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
