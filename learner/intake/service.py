"""The intake process: builds the desk from the journal, then serves samplers and the trainer until told to drain.

Start:  questions → journal replay → broker → gRPC → trainer socket → run state "running"
Stop:   run state "draining" → open leases end → gRPC stops → socket → broker → journal is durable
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from learner.intake.desk import Desk
from learner.intake.journal import Journal, read
from learner.intake.leases import LeaseBook
from learner.intake.questions import QuestionQueue, load_questions
from learner.intake.report import Reporter
from learner.intake.rollout import RolloutServer
from learner.intake.trainer_link import listen
from learner.intake.vocabulary import vocabulary
from learner.intake.weights import WeightsServer
from treegrpo.codec import lease_end_from_pb, lease_end_to_pb, lease_from_pb, subtree_from_pb
from treegrpo.config import Config
from treegrpo.control import ControlPlane, Member, RunState
from treegrpo.errors import ConfigError, ContractError, JournalError
from treegrpo.handoff import socket_path
from treegrpo.lease import LeaseEnd, LeaseEndReason
from treegrpo.telemetry import IntakeMetrics, check_free, serve
from treegrpo.v1 import rollout_pb2, rollout_pb2_grpc, tree_pb2, weights_pb2_grpc

log = logging.getLogger(__name__)
DRAIN_SECONDS = 20.0
GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", 32 << 20),
    ("grpc.max_send_message_length", 32 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


def replay(book: LeaseBook, reporter: Reporter, records: list[dict[str, Any]]) -> None:
    """Put the events of a journal through the book, in order. Raises ContractError if they contradict each other."""
    for record in records:
        match record["event"]:
            case "granted":
                book.replay_grant(lease_from_pb(rollout_pb2.Lease.FromString(record["lease"])), record["draw"])
            case "accepted":
                subtree = subtree_from_pb(tree_pb2.Subtree.FromString(record["subtree"]))
                if book.replay_accepted(subtree):
                    reporter.accepted(book.open[subtree.lease], subtree)
            case _:
                end = lease_end_from_pb(rollout_pb2.LeaseEnd.FromString(record["end"]))
                reporter.ended(book.ended(end), end)


def _open_book(config: Config, reporter: Reporter, path: Path) -> tuple[LeaseBook, int]:
    """The book as the journal tells it, and the journal's whole bytes. Raises TreeGrpoError."""
    train = config.train
    queue = QuestionQueue(load_questions(config.data.train), config.run.seed)
    book = LeaseBook(
        queue,
        config.rollout.plan,
        seed=config.run.seed,
        batch=train.batch,
        max_lag=train.max_lag,
        total=train.steps * train.batch,
        vocabulary=vocabulary(config.model.path),
        mark=secrets.token_hex(2),
    )
    records, size = read(path)
    if records and not config.run.resume:
        raise ConfigError(f"run.dir = {config.run.dir} holds a run already; add --resume to continue it, or choose another.")
    try:
        replay(book, reporter, records)
    except ContractError as error:
        raise JournalError(f"The journal {path} contradicts itself ({error}); restore it, or begin a new run.dir.") from error
    return book, size


async def run(config: Config) -> None:
    """Serve until SIGTERM, SIGINT or the run state says draining.

    Raises:
        ConfigError, DataError, ModelError, JournalError: something given is not usable.
        AddressInUseError: an address to listen on is taken.
        UnavailableError: the broker does not answer.
    """
    check_free(config.learner.listen, "learner.listen")
    run_dir = config.run.dir
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = IntakeMetrics()
    reporter = Reporter(metrics, run_dir / "progress.jsonl", window=config.train.batch)
    heldout = load_questions(config.data.heldout)[: config.eval.questions or None]
    book, size = _open_book(config, reporter, run_dir / "journal" / "journal.msgpack")
    serve(metrics, config.learner.metrics, "learner.metrics")
    member = Member("learner", "learner", secrets.randbits(64), metrics=config.learner.metrics)
    with Journal.open(run_dir / "journal" / "journal.msgpack", size) as journal:
        for lease in list(book.open):  # their samplers died with the last process, or will be told that they are void
            lost = LeaseEnd(lease, LeaseEndReason.LOST)
            reporter.ended(book.ended(lost), lost)
            journal.append({"event": "ended", "end": lease_end_to_pb(lost).SerializeToString()})
        book.evaluate([])  # whoever wants an evaluation asks for it again
        async with ControlPlane.connect(config.broker.address, config.run.name, member) as control:
            await control.set_state(RunState.RUNNING)
            weights = WeightsServer(metrics)
            desk = Desk(book, journal, control, weights, reporter, run=config.run.name, plan=config.rollout.plan, heldout=heldout)
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(journal.write_forever(), name="journal")
                following = tasks.create_task(desk.follow(), name="control")
                await _serve(config, desk, weights, control)
                writing.cancel()
                following.cancel()


async def _serve(config: Config, desk: Desk, weights: WeightsServer, control: ControlPlane) -> None:
    """Open the doors, wait for the signal, drain, close them."""
    server = grpc.aio.server(options=GRPC_OPTIONS)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutServer(desk), server)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights, server)
    healthy = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    server.add_insecure_port(config.learner.listen)
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    async with listen(desk, socket_path(config.run.dir)):
        await server.start()
        await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        log.info("the intake serves samplers at %s", config.learner.listen)
        told = asyncio.create_task(asked.wait(), name="told-to-drain")
        await asyncio.wait({told, desk.broken}, return_when=asyncio.FIRST_COMPLETED)
        await healthy.enter_graceful_shutdown()
        await control.set_state(RunState.DRAINING)
        await desk.drained(DRAIN_SECONDS)
        await server.stop(grace=1.0)
        told.cancel()
        if desk.broken.done():
            desk.broken.result()
