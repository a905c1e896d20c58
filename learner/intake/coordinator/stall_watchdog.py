"""The stall watchdog: when the run makes no progress for longer than usual, it logs what the run waits for.

A line in the log and one in progress.jsonl when the cause changes, and again after twice the time; a gauge all the while.
Progress is a subtree accepted, a batch handed to the trainer, a version published.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from learner.intake.coordinator.coordinator import Coordinator
from learner.intake.coordinator.sampler_sessions import SamplerSession
from learner.intake.coordinator.trainer_api import TrainerApi
from learner.intake.monitoring.progress_clock import ProgressClock
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.monitoring.stall_diagnosis import RunStatus, SamplerStatus, StallCause, StalledPart, diagnose_stall
from learner.intake.wal.journal import Journal

log = logging.getLogger(__name__)
CHECK_SECONDS = 5.0
MAX_REPEAT_SECONDS = 3600.0
"""From one line to the next with the same cause."""


def current_run_status(coordinator: Coordinator, trainer: TrainerApi, journal: Journal) -> RunStatus:
    """The state of the run now."""
    now, table, sessions = time.monotonic(), coordinator.lease_table, coordinator.sessions
    return RunStatus(
        state=coordinator.control.state,
        state_seconds=now - coordinator.state_since,
        blocked_seconds=None if journal.blocked_since is None else now - journal.blocked_since,
        low_space_seconds=None if journal.low_space_since is None else now - journal.low_space_since,
        journal_folder=str(journal.folder),
        trainer=trainer.status,
        samplers=[_sampler_status(coordinator, session, now) for session in sessions.open_sessions.values()],
        no_sampler_seconds=now - sessions.empty_since,
        last_seen=tuple(sessions.last_seen),
        open_leases=len(table.open_leases),
        can_grant=table.has_grantable_work,
        ready_groups=table.train_queue.ready_count,
        batch=table.batch,
    )


def _sampler_status(coordinator: Coordinator, session: SamplerSession, now: float) -> SamplerStatus:
    groups = coordinator.lease_table.open_leases.held_by(session.holder)
    granted = [coordinator.started_at if group.granted_at is None else group.granted_at for group in groups]
    lease_seconds = now - min(granted) if granted else None
    silent_seconds = max(0.0, now - session.last_heard)
    return SamplerStatus(
        *(session.id, silent_seconds, session.demand, lease_seconds), session.waiting_for, session.waited_seconds
    )


class StallWatchdog:
    def __init__(self, clock: ProgressClock, status: Callable[[], RunStatus], recorder: RunRecorder) -> None:
        """``status`` returns the present state of the run."""
        self._clock = clock
        self._status = status
        self._recorder = recorder
        self._logged: StallCause | None = None
        self._repeat_at = 0.0
        """Seconds without progress at which the same cause is logged again."""

    async def watch_forever(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self.check_stall()

    def check_stall(self) -> None:
        """Set the gauge, and log a stall whose cause is new or due again."""
        seconds = self._clock.seconds_without_progress
        found = diagnose_stall(self._status())
        for part in StalledPart:
            self._recorder.metrics.stalled.labels(part.value).set(seconds if part is found.part else 0.0)
        if seconds < self._clock.stall_seconds:
            self._log_recovery()
        elif found != self._logged or seconds >= self._repeat_at:
            self._logged, self._repeat_at = found, seconds + min(seconds, MAX_REPEAT_SECONDS)
            log.warning("no progress for %.0f s; waiting for %s", seconds, found.sentence)
            self._recorder.record_stall(found.sentence, seconds)

    def _log_recovery(self) -> None:
        if self._logged is not None:
            log.info("the run makes progress again")
            self._logged = None
