"""The watchdog: when nothing has gone on for longer than usual, it says what is waited for.

A line in the log and one in progress.jsonl when the cause changes, and again after twice the time; a gauge all the while.
What goes on is a subtree accepted, a batch handed to the trainer, a version published.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from learner.intake.coordinator.coordinator import Desk
from learner.intake.coordinator.sampler_sessions import SamplerSession
from learner.intake.coordinator.trainer_api import TrainerApi
from learner.intake.monitoring.progress_clock import ProgressClock
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.monitoring.stall_diagnosis import RunStatus, SamplerStatus, StallCause, StalledPart, diagnose_stall
from learner.intake.wal.journal import Journal

log = logging.getLogger(__name__)
LOOK_SECONDS = 5.0
MOST_SECONDS = 3600.0
"""From one line to the next with the same cause."""


def current_run_status(desk: Desk, trainer: TrainerApi, journal: Journal) -> RunStatus:
    """How things are now."""
    now, book, sessions = time.monotonic(), desk.book, desk.sessions
    return RunStatus(
        state=desk.control.state,
        changed=now - desk.state_since,
        blocked=None if journal.blocked_since is None else now - journal.blocked_since,
        short=None if journal.short_since is None else now - journal.short_since,
        folder=str(journal.folder),
        trainer=trainer.status,
        workers=[_worker(desk, peer, now) for peer in sessions.open_sessions.values()],
        alone=now - sessions.empty_since,
        last_seen=tuple(sessions.last_seen),
        out=len(book.open),
        room=book.has_work,
        ready=book.groups.ready_count,
        batch=book.batch,
    )


def _worker(desk: Desk, peer: SamplerSession, now: float) -> SamplerStatus:
    granted = [desk.began if group.granted_at is None else group.granted_at for group in desk.book.open.of(peer.holder)]
    held = now - min(granted) if granted else None
    return SamplerStatus(peer.id, max(0.0, now - peer.last_heard), peer.demand, held, peer.waiting_for, peer.waited_seconds)


class StallWatchdog:
    def __init__(self, pace: ProgressClock, status: Callable[[], RunStatus], reporter: RunRecorder) -> None:
        """``status`` returns the present state of the run."""
        self._pace = pace
        self._status = status
        self._reporter = reporter
        self._said: StallCause | None = None
        self._again = 0.0
        """Seconds without progress at which it says the same again."""

    async def run_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.check_stall()

    def check_stall(self) -> None:
        """Say what is to be said now."""
        seconds = time.monotonic() - self._pace.last
        found = diagnose_stall(self._status())
        for part in StalledPart:
            self._reporter.metrics.stalled.labels(part.value).set(seconds if part is found.part else 0.0)
        if seconds < self._pace.patience:
            self._goes_on()
        elif found != self._said or seconds >= self._again:
            self._said, self._again = found, seconds + min(seconds, MOST_SECONDS)
            log.warning("nothing has gone on for %.0f s; waiting for %s", seconds, found.sentence)
            self._reporter.waits(found.sentence, seconds)

    def _goes_on(self) -> None:
        if self._said is not None:
            log.info("the run goes on")
            self._said = None
