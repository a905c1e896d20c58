"""The intake, the file to read first: leases questions to samplers, keeps their subtrees, hands batches to the trainer.

    questions ─► leases ─► subtrees ─► journal ─► groups ─► batches ─► trainer ─► policy version ─► (samplers ─► subtrees)

                      ┌─────────────────────────────────────────┐
    ┌──────────┐ gRPC │ rpc          who may call, size limits  │ Unix  ┌─────────┐
    │          │ ───► │ coordinator  sessions, dispatch, batches│ ◄──── │         │
    │ samplers │      │ leases       table, groups, staleness   │socket │ trainer │
    │          │ ◄─── │ persistence  events, snapshots, recovery│ ────► │         │
    └──────────┘      │ wal          journal, segments, fsync   │       └─────────┘
                      │ monitoring   metrics, progress, stalls  │
                      └────────────────────┬────────────────────┘
                                      MQTT │ run state, versions, last wills

    task           produces                     waits for                          unblocked by
    gRPC stream    events, acks to its sampler  a message of its sampler           heartbeat, subtree, demand, lease end
    trainer socket batches, evaluations         `train.batch` groups, durable      lease ends, the journal; 5 s at most
    dispatch       leases                       demand, and room below the         demand, a lease end, a new version,
                                                staleness bound                    room on the disk, the run state
    journal        durable records              an event                           every change of the lease table
    reserve        spare bytes on the disk      room on the disk                   its interval
    compaction     snapshots, fewer segments    a checkpoint of the trainer        Covered, a segment that was removed
    run-state      drain messages, lost leases  the broker                         an operator, the last will of a sampler
    silence        lost leases                  its interval                       —
    pause          the file `paused`            a change of the run state          an operator
    watchdog       a line about a stall         its interval                       —
    directory      the end of the run           its interval                       —

The lease table changes at once, the journal follows, and an ack is sent when its record is durable. While the disk
refuses, nothing is acked and nothing is leased, and nothing fails. One asyncio loop, hence no locks.

Start:  questions → newest snapshot and the journal since → broker → run state "running" unless paused → trainer socket → gRPC
Stop:   run state "draining" → open leases end → gRPC stops → socket → broker → journal is durable
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from learner.intake.coordinator.coordinator import Coordinator
from learner.intake.coordinator.run_state import persist_pause_forever, restore_run_state
from learner.intake.coordinator.stall_watchdog import StallWatchdog, current_run_status
from learner.intake.coordinator.trainer_api import TrainerApi
from learner.intake.coordinator.version_publisher import VersionPublisher
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.question_file import load_questions
from learner.intake.leases.question_queue import QuestionQueue
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.compaction import JournalCompactor
from learner.intake.persistence.directory_monitor import DirectoryMonitor
from learner.intake.persistence.recovery import JOURNAL, SNAPSHOTS, has_recorded_events, recover_state
from learner.intake.persistence.run_lock import lock_run
from learner.intake.persistence.snapshot import SnapshotStore, StateCapture
from learner.intake.persistence.untrained_run import archive_untrained_run
from learner.intake.rpc.refused_calls import RefusedCalls
from learner.intake.rpc.rollout_servicer import RolloutServicer
from learner.intake.rpc.server import create_server
from learner.intake.rpc.stream_admission import StreamAdmission
from learner.intake.rpc.trainer_socket import serve_trainer
from learner.intake.rpc.weights_servicer import WeightsServicer
from learner.intake.wal.disk_reserve import DiskReserve
from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.journal import Journal
from treegrpo.config.fingerprint import record_fingerprint
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import RunError
from treegrpo.net import limits
from treegrpo.net.address import check_free, check_port
from treegrpo.net.local_socket import socket_path
from treegrpo.observability.metrics import IntakeMetrics, serve_metrics
from treegrpo.runtime.run_directory import check_run_directory, make_run_directory
from treegrpo.runtime.stop_signals import stop_signals
from treegrpo.security.credentials import Credentials
from treegrpo.storage.model_config import read_model_config
from treegrpo.storage.run_files import check_run_files
from treegrpo.v1 import rollout_pb2_grpc, weights_pb2_grpc
from treegrpo.wire.control import ControlPlane, Member, RunState
from treegrpo.wire.size_limits import message_bytes

log = logging.getLogger(__name__)
DRAIN_SECONDS = 20.0
GC_THRESHOLD = 50_000
"""Objects made before Python looks for cycles among them: a subtree is a hundred objects, and none of them is in a cycle."""


async def run_intake(config: Config) -> None:
    """Serve until SIGTERM, SIGINT or the run state says draining.

    Raises:
        ConfigError, DataError, ModelError, JournalError: something given is not usable.
        RunFileError: another program has changed the run's files.
        RunError: their directory is gone, or another run owns run.name on the broker.
        AddressInUseError: an address to listen on is taken.
        UnavailableError: the broker does not answer.
    """
    gc.set_threshold(GC_THRESHOLD)
    access = Credentials.from_config(config.security, Role.LEARNER)
    access.check_listen("learner.listen", config.learner.listen)
    access.check_reach("broker.address", config.broker.address)
    check_port(config.learner.listen, "learner.listen")
    check_free(config.learner.listen, "learner.listen")
    check_run_directory(config.run.dir)
    make_run_directory(config.run.dir)
    check_run_files(config.run.dir)
    with lock_run(config.run.dir):
        await _recover_and_serve(config, access)


def _new_lease_table(config: Config) -> LeaseTable:
    """The lease table of a run that has not begun. Raises DataError and ModelError."""
    train = config.train
    return LeaseTable(
        QuestionQueue(load_questions(config.data.train), config.run.seed),
        config.rollout.plan,
        seed=config.run.seed,
        batch=train.batch,
        max_lag=train.max_lag,
        total=train.steps * train.batch,
        vocabulary=read_model_config(config.model.path).vocabulary,
        mark=secrets.token_hex(8),
    )


async def _recover_and_serve(config: Config, access: Credentials) -> None:
    run_dir = config.run.dir
    disk, folder, snapshots = LocalFileSystem(), run_dir / JOURNAL, SnapshotStore(LocalFileSystem(), run_dir / SNAPSHOTS)
    metrics = IntakeMetrics()
    heldout = load_questions(config.data.heldout)[: config.eval.questions or None]
    table = _new_lease_table(config)
    begun = has_recorded_events(run_dir) and not archive_untrained_run(config)
    run_id = record_fingerprint(config, begun=begun)
    recorder = RunRecorder(metrics, run_dir / "progress.jsonl", window=config.train.batch)
    recovered = recover_state(disk, folder, snapshots, table, recorder)
    serve_metrics(metrics, config.learner.metrics, "learner.metrics", access)
    member = Member("learner", "learner", secrets.randbits(64), metrics=config.learner.metrics, run=run_id)
    with Journal.open_journal(disk, folder, recovered.end) as journal:
        compactor = JournalCompactor(disk, folder, journal, snapshots, lambda: StateCapture(table, recorder))
        recorder.export_journal(journal)
        async with ControlPlane.connect(config.broker.address, config.run.name, member, access) as control:
            await restore_run_state(control, run_dir)
            plan = config.rollout.plan
            coordinator = Coordinator(table, journal, control, recorder, run=config.run.name, plan=plan, heldout=len(heldout))
            versions = VersionPublisher(table, control)
            trainer = TrainerApi(coordinator, versions, heldout, on_checkpoint=compactor.request_snapshot)
            directory = DirectoryMonitor(disk, journal, snapshots, run_dir)
            watchdog = StallWatchdog(
                coordinator.leases.progress_clock, lambda: current_run_status(coordinator, trainer, journal), recorder
            )
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(journal.commit_forever(), name="journal"),
                    tasks.create_task(coordinator.coordinate_forever(), name="control"),
                    tasks.create_task(persist_pause_forever(control, run_dir), name="pause"),
                    tasks.create_task(DiskReserve(disk, journal).maintain_forever(), name="reserve"),
                    tasks.create_task(compactor.compact_forever(), name="compaction"),
                    tasks.create_task(watchdog.watch_forever(), name="watchdog"),
                    tasks.create_task(_fail_if_removed(coordinator, directory, compactor), name="directory"),
                ]
                await _serve(config, coordinator, trainer, versions, control, metrics, access)
                _cancel(reversed(background))


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


async def _fail_if_removed(coordinator: Coordinator, directory: DirectoryMonitor, compactor: JournalCompactor) -> None:
    """End the run when its directory is gone."""
    try:
        await directory.monitor_forever(compactor.request_snapshot)
    except RunError as error:
        if not coordinator.failure.done():
            coordinator.failure.set_exception(error)


async def _serve(
    config: Config,
    coordinator: Coordinator,
    trainer: TrainerApi,
    versions: VersionPublisher,
    control: ControlPlane,
    metrics: IntakeMetrics,
    access: Credentials,
) -> None:
    """Serve the trainer and the samplers until a signal or a failed run, then drain and stop. Raises RunError."""
    health = HealthServicer()
    server = _create_server(config, coordinator, versions, metrics, access, health)
    stop_requested = asyncio.Event()
    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop_requested.set)
    async with serve_trainer(trainer, socket_path(config.run.dir)):
        await server.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        metrics.serving.set(1)
        log.info("the intake serves samplers at %s", config.learner.listen)
        stopping = asyncio.create_task(stop_requested.wait(), name="stop-signal")
        await asyncio.wait({stopping, coordinator.failure}, return_when=asyncio.FIRST_COMPLETED)
        metrics.serving.set(0)
        await health.enter_graceful_shutdown()
        await control.set_state(RunState.DRAINING)
        await coordinator.drain_leases(0.0 if coordinator.failure.done() else DRAIN_SECONDS)
        await server.stop(grace=1.0)
        stopping.cancel()
        if coordinator.failure.done():
            coordinator.failure.result()


def _create_server(
    config: Config,
    coordinator: Coordinator,
    versions: VersionPublisher,
    metrics: IntakeMetrics,
    access: Credentials,
    health: HealthServicer,
) -> grpc.aio.Server:
    """The gRPC server with its services, not started."""
    refused_calls = RefusedCalls(metrics)
    max_bytes = message_bytes(config.rollout.plan)
    admission = StreamAdmission(refused_calls, limits.samplers(max_bytes))
    server = create_server(config.learner.listen, access, refused_calls, max_bytes)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutServicer(coordinator, admission, refused_calls), server)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(WeightsServicer(versions, metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server
