"""The intake's answers to the trainer: batches out; versions, checkpoints and evaluations in.

treegrpo/wire/trainer_protocol.py has the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from learner.intake.coordinator.coordinator import Desk
from learner.intake.leases.evaluation import Round
from learner.intake.monitoring.stall_diagnosis import TrainerStatus
from learner.intake.rpc.weights_servicer import WeightsServicer
from learner.intake.wal.journal import wait_until_durable
from treegrpo.core.question import Question
from treegrpo.core.step import PolicyVersion
from treegrpo.wire.control import RunState
from treegrpo.wire.trainer_protocol import Evaluation, Taken, pack_encoded

log = logging.getLogger(__name__)
LONG_POLL_SECONDS = 5.0


class TrainerApi:
    def __init__(self, desk: Desk, weights: WeightsServicer, heldout: list[Question], checkpointed: Callable[[], None]) -> None:
        """``checkpointed`` is called when a checkpoint stands, and the journal may get shorter."""
        self._desk = desk
        self._weights = weights
        self._heldout = heldout
        self._checkpointed = checkpointed
        self._round: Round | None = None
        self._publishing = asyncio.Lock()
        self._told_damaged: PolicyVersion | None = None
        weights.on_damaged = desk.changed.tell
        self._connections = 0
        self._asking = 0
        self._came = False
        self._since = time.monotonic()

    async def take(self, position: int, count: int) -> Taken:
        """``count`` closed groups from ``position`` on, as soon as there are that many; none after a few seconds."""
        desk, deadline = self._desk, time.monotonic() + LONG_POLL_SECONDS
        while True:
            state = desk.control.state
            groups = desk.batches.batch(position, count) if state is RunState.RUNNING else []
            if groups or self._untold_damage or state is RunState.DRAINING or time.monotonic() > deadline:
                desk.grant()
                if groups and not await wait_until_durable(desk.clerk.given, deadline):
                    groups = []  # a full disk; the trainer asks again
                if groups:
                    desk.pace.progress()
                return Taken([pack_encoded(g.group, g.encoded) for g in groups], state.value, self._tell_damage())
            await desk.changed.wait(min(deadline, desk.batches.patience))

    async def publish(self, version: PolicyVersion, path: Path, position: int) -> None:
        """Serve and announce a policy version; the groups before ``position`` made it."""
        async with self._publishing:  # one that is asked for again while its files are read waits for them
            await self._weights.publish(version, path)
            self._told_damaged = None
            self._desk.book.version = version
            self._desk.book.groups.trained(position)
            await self._desk.control.announce(version)
        self._desk.pace.progress()
        self._desk.grant()

    def covered(self, position: int) -> None:
        """A checkpoint covers the groups before ``position``."""
        self._desk.book.groups.covered(position)
        self._checkpointed()

    async def evaluate(self, version: PolicyVersion) -> Evaluation:
        """Begin the evaluation of ``version`` unless it runs, and wait a few seconds for its end."""
        desk = self._desk
        if self._round is None or self._round.version != version:
            self._round = Round(version, self._heldout, desk.book.answers)
            missing = self._round.missing
            if 0 < len(missing) < len(self._heldout):
                log.info("the evaluation of %s goes on; %d questions of %d are left", version, len(missing), len(self._heldout))
            desk.book.evaluate(version, missing)
            desk.grant()
        deadline = time.monotonic() + LONG_POLL_SECONDS
        while not (self._round.done or self._untold_damage or desk.control.state is RunState.DRAINING):
            if not await desk.changed.wait(deadline):
                break
        if self._round.done:
            desk.reporter.evaluated(self._round, desk.book)
        return replace(self._round.result(), state=desk.control.state.value, damaged=self._tell_damage())

    @property
    def _untold_damage(self) -> bool:
        """Whether the trainer is to hear at once that it has to write a version again."""
        return self._weights.damaged not in (None, self._told_damaged)

    def _tell_damage(self) -> str:
        """The version that the trainer has to write again, empty if there is none; it is told now."""
        self._told_damaged = self._weights.damaged
        return str(self._told_damaged or "")

    def report(self, values: dict[str, object]) -> None:
        """A line for the run's progress file."""
        self._desk.reporter.step(values, self._desk.book)

    # ---- whether it is there

    @contextlib.contextmanager
    def connection(self) -> Generator[None]:
        """A trainer is connected for the time of the block."""
        self._connections += 1
        self._came, self._since = True, time.monotonic()
        try:
            yield
        finally:
            self._connections -= 1
            self._since = time.monotonic()

    @contextlib.contextmanager
    def question(self) -> Generator[None]:
        """It waits for an answer for the time of the block."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._since = time.monotonic()

    @property
    def seen(self) -> TrainerStatus:
        """The trainer as it is now."""
        step = self._desk.book.version.step if self._desk.book.version else 0
        return TrainerStatus(self._came, self._connections > 0, self._asking > 0, time.monotonic() - self._since, step)
