"""The trainer's side of the conversation with the intake: every wait ends with groups, a drain or an error."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, Self

from treegrpo.errors import UnavailableError
from treegrpo.handoff import (
    Covered,
    Done,
    Evaluate,
    Evaluation,
    IntakeClient,
    Publish,
    Report,
    Take,
    Taken,
)
from treegrpo.tree import PolicyVersion

log = logging.getLogger(__name__)
CONNECT_SECONDS = 30.0
"""The intake is started beside the trainer and may need a moment more."""
RETRY_SECONDS = 0.1


class Link:
    """Asks the intake and remembers whether the run is to end."""

    def __init__(self, client: IntakeClient, stop: threading.Event) -> None:
        self._client = client
        self._stop = stop
        """Set by a signal: end as if the run drained."""
        self._told = False

    @classmethod
    def open(cls, path: str, stop: threading.Event, seconds: float = CONNECT_SECONDS) -> Self:
        """Connect to the intake at ``path``. Raises UnavailableError when nobody listens for ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return cls(IntakeClient(path), stop)
            except UnavailableError:
                if stop.wait(RETRY_SECONDS) or time.monotonic() > deadline:
                    raise

    @property
    def draining(self) -> bool:
        return self._told or self._stop.is_set()

    def take(self, position: int, count: int) -> list[bytes]:
        """The next groups after ``position``, packed; empty when the run drains. A paused run is waited out."""
        while not self.draining:
            taken = self._client.ask(Take(position, count), Taken)
            if taken.groups:
                return taken.groups
            self._told = taken.state == "draining"
        return []

    def evaluate(self, version: PolicyVersion) -> Evaluation | None:
        """The evaluation of a published version, None when the run drains before it is done."""
        while not self.draining:
            result = self._client.ask(Evaluate(str(version)), Evaluation)
            if result.done:
                return result
            self._told = result.state == "draining"
        return None

    def publish(self, version: PolicyVersion, folder: Path, position: int) -> None:
        """Have ``folder`` served as ``version``; the groups before ``position`` made it."""
        self._client.ask(Publish(str(version), str(folder.absolute()), position), Done)

    def covered(self, position: int) -> None:
        """A checkpoint stands that has trained the groups before ``position``."""
        self._client.ask(Covered(position), Done)

    def report(self, values: dict[str, Any]) -> None:
        """Add a record to the run's progress file."""
        self._client.ask(Report(values), Done)

    def close(self) -> None:
        self._client.close()
