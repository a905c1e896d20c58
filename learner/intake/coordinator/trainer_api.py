"""The intake's answers to the trainer: batches out; versions, checkpoints and evaluations in.

treegrpo/wire/trainer_protocol.py has the messages; a method for each begins with ``handle_``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from learner.intake.coordinator.coordinator import Coordinator
from learner.intake.coordinator.version_publisher import VersionPublisher
from learner.intake.leases.evaluation import EvaluationRound
from learner.intake.monitoring.stall_diagnosis import TrainerStatus
from learner.intake.wal.journal import wait_until_durable
from treegrpo.core.question import Question
from treegrpo.core.step import PolicyVersion
from treegrpo.wire.control import RunState
from treegrpo.wire.trainer_protocol import Evaluation, Taken, pack_encoded_group

log = logging.getLogger(__name__)
LONG_POLL_SECONDS = 5.0
"""The longest that a request of the trainer waits for something to answer with."""


class TrainerApi:
    def __init__(
        self,
        coordinator: Coordinator,
        versions: VersionPublisher,
        heldout: list[Question],
        on_checkpoint: Callable[[], None],
        long_poll_seconds: float = LONG_POLL_SECONDS,
    ) -> None:
        """``on_checkpoint`` is called when the trainer has a new checkpoint: the journal may get shorter."""
        self._table, self._batcher, self._leases = coordinator.lease_table, coordinator.batcher, coordinator.leases
        self._staleness, self._dispatcher = coordinator.staleness, coordinator.dispatcher
        self._control, self._recorder, self._clock = coordinator.control, coordinator.recorder, self._leases.progress_clock
        self._changed = coordinator.changed
        self._versions = versions
        self._heldout = heldout
        self._on_checkpoint = on_checkpoint
        self._long_poll_seconds = long_poll_seconds
        self._evaluation: EvaluationRound | None = None
        self._reported_damage: PolicyVersion | None = None
        """The version of which the trainer knows that it is damaged."""
        versions.on_damaged = self._changed.notify
        self._connections = 0
        self._requests = 0
        self._has_connected = False
        self._state_since = time.monotonic()

    async def handle_take(self, position: int, count: int) -> Taken:
        """Return ``count`` closed groups from ``position`` on when they are ready; none after a few seconds."""
        deadline = time.monotonic() + self._long_poll_seconds
        while True:
            state = self._control.state
            groups = self._batcher.take_batch(position, count) if state is RunState.RUNNING else []
            if groups or self._has_news or time.monotonic() > deadline:
                self._dispatcher.wake_dispatcher()
                if groups and not await wait_until_durable(self._leases.positions_durable, deadline):
                    groups = []  # a full disk; the trainer asks again
                if groups:
                    self._clock.record_progress()
                return Taken([pack_encoded_group(g.group, g.encoded) for g in groups], state.value, self._report_damage())
            await self._changed.wait(min(deadline, self._staleness.next_deadline))

    async def handle_publish(self, version: PolicyVersion, path: Path, position: int) -> None:
        """Publish the version in ``path``, which was trained on the groups before ``position``. Raises ContractError."""
        await self._versions.publish_version(version, path, position)
        self._reported_damage = None
        self._clock.record_progress()
        self._dispatcher.wake_dispatcher()

    def handle_covered(self, position: int) -> None:
        """Drop the groups before ``position``, which a checkpoint covers."""
        self._table.forget_covered(position)
        self._on_checkpoint()

    async def handle_evaluate(self, version: PolicyVersion) -> Evaluation:
        """Begin the evaluation of ``version`` unless it runs, and wait a few seconds for its end."""
        evaluation = self._evaluation
        if evaluation is None or evaluation.version != version:
            evaluation = self._begin_evaluation(version)
        deadline = time.monotonic() + self._long_poll_seconds
        while not (evaluation.is_done or self._has_news):
            if not await self._changed.wait(deadline):
                break
        if evaluation.is_done:
            self._recorder.record_evaluation(evaluation, self._table)
        return replace(evaluation.result(), state=self._control.state.value, damaged=self._report_damage())

    def _begin_evaluation(self, version: PolicyVersion) -> EvaluationRound:
        evaluation = self._evaluation = EvaluationRound(version, self._heldout, self._table.evaluation_answers)
        missing = evaluation.missing_questions
        if 0 < len(missing) < len(self._heldout):
            log.info("the evaluation of %s continues; %d questions of %d are left", version, len(missing), len(self._heldout))
        self._table.queue_evaluation(version, missing)
        self._dispatcher.wake_dispatcher()
        return evaluation

    def handle_step_report(self, values: dict[str, object]) -> None:
        """Write a step's record to the run's progress file."""
        self._recorder.record_step(values, self._table)

    @property
    def _has_news(self) -> bool:
        """Whether a waiting request returns at once: the run drains, or a version has to be written again."""
        is_new_damage = self._versions.damaged not in (None, self._reported_damage)
        return is_new_damage or self._control.state is RunState.DRAINING

    def _report_damage(self) -> str:
        """The damaged version that the trainer has to write again, empty if there is none; note that it was reported."""
        self._reported_damage = self._versions.damaged
        return str(self._reported_damage or "")

    # ---- whether it is connected

    @contextlib.contextmanager
    def track_connection(self) -> Generator[None]:
        """Count a connected trainer for the time of the block."""
        self._connections += 1
        self._has_connected, self._state_since = True, time.monotonic()
        try:
            yield
        finally:
            self._connections -= 1
            self._state_since = time.monotonic()

    @contextlib.contextmanager
    def track_request(self) -> Generator[None]:
        """Note that the trainer waits for a response for the time of the block."""
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            self._state_since = time.monotonic()

    @property
    def status(self) -> TrainerStatus:
        """The trainer as it is now."""
        step = self._table.version.step if self._table.version else 0
        seconds = time.monotonic() - self._state_since
        return TrainerStatus(self._has_connected, self._connections > 0, self._requests > 0, seconds, step)
