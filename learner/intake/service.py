"""The intake process: builds the desk from the journal, then serves samplers and the trainer until told to drain.

Start:  questions → newest snapshot and the journal since → broker → run state "running" unless paused → trainer socket → gRPC
Stop:   run state "draining" → open leases end → gRPC stops → socket → broker → journal is durable
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from learner.intake.coordinator import run_state
from learner.intake.coordinator.coordinator import Desk
from learner.intake.coordinator.published_versions import PublishedVersions
from learner.intake.coordinator.stall_watchdog import StallWatchdog, current_run_status
from learner.intake.coordinator.trainer_api import TrainerApi
from learner.intake.leases.lease_table import LeaseBook
from learner.intake.leases.question_queue import QuestionQueue, load_questions
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.compaction import JournalCompactor
from learner.intake.persistence.directory_watch import DirectoryMonitor
from learner.intake.persistence.recovery import JOURNAL, SNAPSHOTS, has_recorded_events, recover
from learner.intake.persistence.run_lock import lock_run
from learner.intake.persistence.snapshot import SnapshotStore, StateCapture
from learner.intake.persistence.untrained_run import archive_untrained_run
from learner.intake.rpc.rollout_servicer import RolloutServicer
from learner.intake.rpc.server import ConnectionMonitor, StreamAdmission, create_server
from learner.intake.rpc.trainer_socket import listen
from learner.intake.rpc.weights_servicer import WeightsServicer
from learner.intake.wal.disk_reserve import DiskReserve
from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.journal import Journal
from treegrpo.config.fingerprint import record_fingerprint
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import RunError
from treegrpo.net.address import check_free, check_port
from treegrpo.observability.metrics import IntakeMetrics, serve
from treegrpo.runtime.run_directory import check_run_directory, make_run_directory
from treegrpo.runtime.stop_signals import stop_signals
from treegrpo.security.credentials import Credentials
from treegrpo.storage.model_config import read_model_config
from treegrpo.storage.run_files import check_run_files
from treegrpo.v1 import rollout_pb2_grpc, weights_pb2_grpc
from treegrpo.wire.control import ControlPlane, Member, RunState
from treegrpo.wire.size_limits import message_bytes
from treegrpo.wire.trainer_protocol import socket_path

log = logging.getLogger(__name__)
DRAIN_SECONDS = 20.0
GARBAGE_OBJECTS = 50_000
"""Made before somebody looks for cycles among them: a subtree is a hundred objects, and none of them is in a cycle."""


def _book(config: Config) -> LeaseBook:
    """The book of a run that has not begun. Raises DataError and ModelError."""
    train = config.train
    return LeaseBook(
        QuestionQueue(load_questions(config.data.train), config.run.seed),
        config.rollout.plan,
        seed=config.run.seed,
        batch=train.batch,
        max_lag=train.max_lag,
        total=train.steps * train.batch,
        vocabulary=read_model_config(config.model.path).vocabulary,
        mark=secrets.token_hex(8),
    )


async def run(config: Config) -> None:
    """Serve until SIGTERM, SIGINT or the run state says draining.

    Raises:
        ConfigError, DataError, ModelError, JournalError: something given is not usable.
        RunFileError: another program has touched the run's files.
        RunError: their directory is gone, or another run owns run.name on the broker.
        AddressInUseError: an address to listen on is taken.
        UnavailableError: the broker does not answer.
    """
    gc.set_threshold(GARBAGE_OBJECTS)
    access = Credentials.of(config.security, Role.LEARNER)
    access.check_listen("learner.listen", config.learner.listen)
    access.check_reach("broker.address", config.broker.address)
    check_port(config.learner.listen, "learner.listen")
    check_free(config.learner.listen, "learner.listen")
    check_run_directory(config.run.dir)
    make_run_directory(config.run.dir)
    check_run_files(config.run.dir)
    with lock_run(config.run.dir):
        await _run(config, access)


async def _run(config: Config, access: Credentials) -> None:
    run_dir = config.run.dir
    disk, folder, snapshots = LocalFileSystem(), run_dir / JOURNAL, SnapshotStore(LocalFileSystem(), run_dir / SNAPSHOTS)
    metrics = IntakeMetrics()
    heldout = load_questions(config.data.heldout)[: config.eval.questions or None]
    book = _book(config)
    begun = has_recorded_events(run_dir) and not archive_untrained_run(config)
    run_id = record_fingerprint(config, begun=begun)
    reporter = RunRecorder(metrics, run_dir / "progress.jsonl", window=config.train.batch)
    recovered = recover(disk, folder, snapshots, book, reporter)
    serve(metrics, config.learner.metrics, "learner.metrics", access)
    member = Member("learner", "learner", secrets.randbits(64), metrics=config.learner.metrics, run=run_id)
    with Journal.open(disk, folder, recovered.end) as journal:
        compaction = JournalCompactor(disk, folder, journal, snapshots, lambda: StateCapture(book, reporter))
        reporter.watch(journal)
        async with ControlPlane.connect(config.broker.address, config.run.name, member, access) as control:
            await run_state.begin(control, run_dir)
            plan = config.rollout.plan
            desk = Desk(book, journal, control, reporter, run=config.run.name, plan=plan, heldout=len(heldout))
            versions = PublishedVersions(book, control)
            trainer = TrainerApi(desk, versions, heldout, on_checkpoint=compaction.ask)
            directory = DirectoryMonitor(disk, journal, snapshots, run_dir)
            dog = StallWatchdog(desk.pace, lambda: current_run_status(desk, trainer, journal), reporter)
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(journal.write_forever(), name="journal")
                following = tasks.create_task(desk.follow(), name="control")
                pausing = tasks.create_task(run_state.remember(control, run_dir), name="pause")
                keeping = tasks.create_task(DiskReserve(disk, journal).keep_forever(), name="reserve")
                compacting = tasks.create_task(compaction.run_forever(), name="compaction")
                watching = tasks.create_task(dog.run_forever(), name="watchdog")
                seeing = tasks.create_task(_see_to(desk, directory, compaction), name="directory")
                await _serve(config, desk, trainer, versions, control, metrics, access)
                for task in (seeing, watching, compacting, keeping, writing, following, pausing):
                    task.cancel()


async def _see_to(desk: Desk, directory: DirectoryMonitor, compaction: JournalCompactor) -> None:
    """End the run when its directory is gone."""
    try:
        await directory.run_forever(snapshot=compaction.ask)
    except RunError as error:
        if not desk.broken.done():
            desk.broken.set_exception(error)


async def _serve(
    config: Config,
    desk: Desk,
    trainer: TrainerApi,
    versions: PublishedVersions,
    control: ControlPlane,
    metrics: IntakeMetrics,
    access: Credentials,
) -> None:
    """Open the doors, wait for the signal, drain, close them."""
    visitors = ConnectionMonitor(metrics)
    most = message_bytes(config.rollout.plan)
    server = create_server(config.learner.listen, access, visitors, most)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutServicer(desk, StreamAdmission(visitors, most)), server)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(WeightsServicer(versions, metrics), server)
    healthy = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    asked = asyncio.Event()
    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    async with listen(trainer, socket_path(config.run.dir)):
        await server.start()
        await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        metrics.serving.set(1)
        log.info("the intake serves samplers at %s", config.learner.listen)
        told = asyncio.create_task(asked.wait(), name="told-to-drain")
        await asyncio.wait({told, desk.broken}, return_when=asyncio.FIRST_COMPLETED)
        metrics.serving.set(0)
        await healthy.enter_graceful_shutdown()
        await control.set_state(RunState.DRAINING)
        await desk.drained(0.0 if desk.broken.done() else DRAIN_SECONDS)
        await server.stop(grace=1.0)
        told.cancel()
        if desk.broken.done():
            desk.broken.result()
