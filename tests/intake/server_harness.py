"""The intake's door for samplers in this process: real gRPC, a real journal, a clock that runs faster."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from learner.intake.coordinator.coordinator import Coordinator
from learner.intake.coordinator.timings import CoordinatorTimings
from learner.intake.coordinator.trainer_api import LONG_POLL_SECONDS, TrainerApi
from learner.intake.coordinator.version_publisher import VersionPublisher
from learner.intake.leases.circuit_breaker import BreakerLimits
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.recovery import recover_state
from learner.intake.persistence.snapshot import SnapshotStore
from learner.intake.rpc.auth_interceptor import CallLimits
from learner.intake.rpc.refused_calls import RefusedCalls
from learner.intake.rpc.rollout_servicer import RolloutServicer
from learner.intake.rpc.server import create_server
from learner.intake.rpc.stream_admission import StreamAdmission
from learner.intake.rpc.weights_servicer import WeightsServicer
from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.journal import Journal
from tests.intake.builders import PLAN, VERSION, make_table, question
from tests.ports import free_address
from treegrpo.config.schema import SecurityConfig
from treegrpo.config.security import Role
from treegrpo.core.step import PolicyVersion
from treegrpo.net import limits
from treegrpo.net.limits import MESSAGE_BYTES
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.security.credentials import OPEN, Credentials
from treegrpo.v1 import rollout_pb2_grpc, weights_pb2_grpc
from treegrpo.wire.control import ControlPlane, Member


def offline_control() -> ControlPlane:
    """A control plane without a broker."""
    access = Credentials.from_config(SecurityConfig(), Role.LEARNER)
    return ControlPlane("127.0.0.1:1", "test", Member("learner", "learner", 1), access)


def no_versions() -> VersionPublisher:
    """A store of versions before the first is published."""
    return VersionPublisher(make_table(), offline_control())


def short_timings(silence: float = 0.4) -> CoordinatorTimings:
    return CoordinatorTimings(
        silence_seconds=silence,
        will_grace_seconds=silence / 4,
        silence_check_seconds=silence / 20,
        finishing_seconds=silence,
    )


@dataclass
class IntakeFixture:
    coordinator: Coordinator
    trainer: TrainerApi
    journal: Journal
    control: ControlPlane
    metrics: IntakeMetrics
    versions: VersionPublisher
    address: str

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"treegrpo_{name}", labels) or 0.0

    def publish(self, step: int, position: int) -> None:
        """The trainer has made a version of the groups before ``position``."""
        self.coordinator.lease_table.set_policy_version(PolicyVersion(1, step), position)
        self.coordinator.dispatcher.wake_dispatcher()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what nobody announces; the test's time limit ends it."""
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serve_intake(
    table: LeaseTable,
    folder: Path,
    timings: CoordinatorTimings | None = None,
    call_limits: CallLimits | None = None,
    breaker_limits: BreakerLimits | None = None,
    long_poll_seconds: float = LONG_POLL_SECONDS,
) -> AsyncGenerator[IntakeFixture]:
    """Serve ``table`` after what the journal in ``folder`` has, at policy step 0."""
    metrics, disk = IntakeMetrics(), LocalFileSystem()
    recorder = RunRecorder(metrics, folder / "progress.jsonl", window=4)
    recovered = recover_state(disk, folder / "journal", SnapshotStore(disk, folder / "snapshots"), table, recorder)
    control = offline_control()
    table.version = VERSION
    with Journal.open_journal(disk, folder / "journal", recovered.end) as journal:
        timings, versions = timings or CoordinatorTimings(), VersionPublisher(table, control)
        coordinator = Coordinator(
            table, journal, control, recorder, run="test", plan=PLAN, heldout=1, timings=timings, breaker_limits=breaker_limits
        )
        trainer = TrainerApi(coordinator, versions, [question(90)], lambda: None, long_poll_seconds=long_poll_seconds)
        refused_calls, address = RefusedCalls(metrics), free_address()
        server = create_server(address, OPEN, refused_calls, MESSAGE_BYTES, call_limits=call_limits)
        rollout = RolloutServicer(coordinator, StreamAdmission(refused_calls, limits.samplers(MESSAGE_BYTES)), refused_calls)
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(rollout, server)
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(WeightsServicer(versions, metrics), server)
        await server.start()
        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(journal.commit_forever()), tasks.create_task(coordinator.coordinate_forever())]
            try:
                yield IntakeFixture(coordinator, trainer, journal, control, metrics, versions, address)
            finally:
                await server.stop(grace=None)
                for task in working:
                    task.cancel()
