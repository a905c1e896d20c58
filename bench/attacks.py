"""Benchmark of attacks on the intake by a hostile sampler: memory of the intake, and delay of other peers.

    python -m bench.attacks [--seconds 4] [--only half gzip …]

Each attack runs against a separate intake: the real process, with broker and journal. Its resident memory is measured during
the attack and some seconds after it; meanwhile an honest peer sends health checks. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from bench.http2 import PING, SETTINGS, Connection, frame, grpc_frame
from bench.ingest import free_address, prepare, process, ready
from bench.simulated_samplers import resident
from bench.traffic import encoded
from services.cli.processes.readiness import probe_broker, probe_learner
from treegrpo.errors import UnavailableError
from treegrpo.net.limits import MESSAGE_BYTES
from treegrpo.v1 import rollout_pb2 as pb

ROLLOUT = "/treegrpo.v1.RolloutService/Rollout"
DESCRIBE = "/treegrpo.v1.WeightsService/DescribeWeights"
CONNECTIONS, CALLS = 4, 16
"""Of an attack by size."""
MANY_CONNECTIONS, MANY_CALLS = 64, 32
"""Of an attack by number."""
ALLOWED_BYTES = 640 << 10
REST_SECONDS = 5.0
"""After the attack, before memory is read for the last time."""
WATCH_SECONDS = 0.05

Attack = Callable[[str, float], None]


def hello(number: int) -> bytes:
    """The first message of an unknown sampler."""
    return encoded(hello=pb.Hello(sampler=f"bad-{number}", incarnation=1, engine="bad", capacity=1))


def half(address: str, seconds: float) -> None:
    """Messages that lack their last byte, on many streams that have not said Hello."""
    payload = grpc_frame(bytes(MESSAGE_BYTES - 1), MESSAGE_BYTES)
    _at_once(address, CONNECTIONS, lambda _, connection: _calls(connection, CALLS, ROLLOUT, payload, seconds))


def half_joined(address: str, seconds: float) -> None:
    """The same behind a Hello, each stream under a name of its own."""
    payload = grpc_frame(bytes(MESSAGE_BYTES - 1), MESSAGE_BYTES)

    def strike(number: int, connection: Connection) -> None:
        for stream in range(CALLS):
            connection.call(ROLLOUT, grpc_frame(hello(CALLS * number + stream)), payload)
        connection.pump(seconds)

    _at_once(address, CONNECTIONS, strike)


def half_unary(address: str, seconds: float) -> None:
    """The same where one small message is expected."""
    payload = grpc_frame(bytes(MESSAGE_BYTES - 1), MESSAGE_BYTES)
    _at_once(address, CONNECTIONS, lambda _, connection: _calls(connection, CALLS, DESCRIBE, payload, seconds))


def half_allowed(address: str, seconds: float) -> None:
    """Messages of a size that the run's plan allows, on as many streams as the server lets in."""
    payload = grpc_frame(bytes(ALLOWED_BYTES - 1), ALLOWED_BYTES)
    _at_once(address, MANY_CONNECTIONS, lambda _, connection: _calls(connection, MANY_CALLS, ROLLOUT, payload, seconds))


def bomb(address: str, seconds: float) -> None:
    """Whole messages, compressed a thousandfold."""
    payload = grpc_frame(gzip.compress(bytes(MESSAGE_BYTES - 1)), compressed=True)
    encoding = {"grpc-encoding": "gzip"}
    _at_once(address, CONNECTIONS, lambda _, connection: _calls(connection, CALLS, ROLLOUT, payload, seconds, encoding))


def streams(address: str, seconds: float) -> None:
    """As many calls as the server lets in, each with as much data as fits into its window."""
    payload = grpc_frame(bytes(MESSAGE_BYTES - 1), MESSAGE_BYTES)[: 1 << 20]
    _at_once(address, MANY_CONNECTIONS, lambda _, connection: _calls(connection, MANY_CALLS, ROLLOUT, payload, seconds))


def tiny(address: str, seconds: float) -> None:
    """Heartbeats and demands of a few bytes, as fast as they are taken."""
    payload = b"".join(
        grpc_frame(encoded(demand=pb.Demand(leases=number % 3)) if number % 2 else encoded(heartbeat=pb.Heartbeat()))
        for number in range(20_000)
    )

    def strike(number: int, connection: Connection) -> None:
        stream, end = connection.call(ROLLOUT, grpc_frame(hello(number))), time.monotonic() + seconds
        while time.monotonic() < end and connection.open_streams:
            connection.queue_data(stream, payload)
            connection.pump(end - time.monotonic(), drained=True)

    _at_once(address, CONNECTIONS, strike)


def joining(address: str, seconds: float) -> None:
    """A Hello after the other, each of another incarnation, on a new stream."""

    def strike(number: int, connection: Connection) -> None:
        end, incarnation = time.monotonic() + seconds, 0
        while time.monotonic() < end and not connection.closed:
            incarnation += 1
            again = pb.Hello(sampler=f"bad-{number}", incarnation=incarnation, engine="bad", capacity=1)
            connection.call(ROLLOUT, grpc_frame(encoded(hello=again)))
            connection.pump(0.005)

    _at_once(address, CONNECTIONS, strike)


def frames(address: str, seconds: float) -> None:
    """Settings and pings without end."""
    payload = (frame(SETTINGS, 0, 0, b"\0\3\0\0\0\1") + frame(PING, 0, 0, bytes(8))) * 500

    def strike(_: int, connection: Connection) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not connection.closed:
            connection.send_bytes(payload)
            connection.pump(0.01)

    _at_once(address, CONNECTIONS, strike)


ATTACKS: dict[str, Attack] = {
    "gzip": bomb,
    "half": half,
    "half_joined": half_joined,
    "half_unary": half_unary,
    "half_allowed": half_allowed,
    "streams": streams,
    "tiny": tiny,
    "joining": joining,
    "frames": frames,
}


def _calls(
    connection: Connection, calls: int, path: str, payload: bytes, seconds: float, headers: dict[str, str] | None = None
) -> None:
    for _ in range(calls):
        connection.call(path, payload, headers=headers)
    connection.pump(seconds)


def _at_once(address: str, connections: int, strike: Callable[[int, Connection], None]) -> None:
    """Each connection in a thread of its own; ends when all have ended."""

    def run(number: int) -> None:
        with contextlib.suppress(OSError), Connection(address) as connection:
            strike(number, connection)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass(frozen=True, slots=True)
class AttackCost:
    """The measured cost of one attack."""

    attack: str
    peak_mb: float
    """What resident memory grew by, at most, while it went on."""
    kept_mb: float
    """What it was still larger by, REST_SECONDS after the end."""
    health_s: float
    """The longest that an honest peer waited for a health check; it repeats the check."""
    failed: int
    """How many of its checks failed."""


async def watch(address: str, pid: int, striking: subprocess.Popen[bytes]) -> tuple[int, float, int]:
    """Most memory, longest health check and failed ones until ``striking`` ends."""
    peak, longest, failed = 0, 0.0, 0

    async def sample_memory() -> None:
        nonlocal peak
        while striking.poll() is None:
            peak = max(peak, resident(pid))
            await asyncio.sleep(WATCH_SECONDS)

    looking = asyncio.create_task(sample_memory())
    while striking.poll() is None:
        began = time.perf_counter()
        try:
            await probe_learner(address)
        except UnavailableError:
            failed += 1
        longest = max(longest, time.perf_counter() - began)
        await asyncio.sleep(WATCH_SECONDS)
    await looking
    return peak, longest, failed


def measure(name: str, seconds: float) -> AttackCost:
    """One attack on one intake."""
    addresses = {part: free_address() for part in ("broker", "intake", "metrics")}
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        flags = prepare(folder)
        flags += ["--broker.address", addresses["broker"], "--learner.listen", addresses["intake"]]
        flags += ["--learner.metrics", addresses["metrics"], "--train.steps", "1000000"]
        stack.enter_context(process("services.broker.server", "--broker.address", addresses["broker"], log=folder / "broker.log"))
        ready("broker", lambda: probe_broker(addresses["broker"]))
        intake = stack.enter_context(process("learner.intake", *flags, log=folder / "intake.log"))
        ready("intake", lambda: probe_learner(addresses["intake"]))
        before = resident(intake.pid)
        with subprocess.Popen(
            [sys.executable, "-m", "bench.attacks", "--strike", name, addresses["intake"], str(seconds)]
        ) as striking:
            peak, longest, failed = asyncio.run(watch(addresses["intake"], intake.pid, striking))
        time.sleep(REST_SECONDS)
        after = resident(intake.pid)
    return AttackCost(name, round((peak - before) / 1e6, 1), round((after - before) / 1e6, 1), round(longest, 3), failed)


def show(harms: Sequence[AttackCost]) -> None:
    table = Table("attack", "peak, MB", "kept, MB", "health check, s", "failed", title="Memory of the intake under attack")
    for harm in harms:
        table.add_row(*(str(value) for value in asdict(harm).values()))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description="Memory of the intake under attack.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each attack")
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--strike", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.strike:
        name, address, seconds = given.strike
        ATTACKS[name](address, float(seconds))
        return
    harms: list[AttackCost] = []
    for name in given.only:
        harms.append(measure(name, given.seconds))
        print(".", end="", file=sys.stderr, flush=True)
    show(harms)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    summary = {
        "machine": machine,
        "grpc": grpc.__version__,
        "seconds": given.seconds,
        "attacks": [asdict(harm) for harm in harms],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
