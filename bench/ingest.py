"""Benchmark of the intake's throughput: subtrees per second with journal and acks, relative to a gRPC echo server.

    python -m bench.ingest [--samplers 1 16 128 1000] [--seconds 3] [--seed 0]

For each number of samplers and size of subtree a separate intake (the real process: broker, journal, fsync, acks,
checkpoints) and an echo server (`bench.echo`: the same messages in, acks and leases of the same size out, nothing stored)
alternately serve the same simulated samplers (`bench.simulated_samplers`). A trainer that does not train takes every group,
so that the staleness bound delays no sampler. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.traffic import PLAN, SIZES, VOCABULARY, Script, Slice, over
from services.cli.processes.readiness import Probe, probe_broker, probe_learner, wait_until_ready
from treegrpo.errors import UnavailableError
from treegrpo.net.local_socket import socket_path
from treegrpo.wire.trainer_protocol import Covered, Done, IntakeConnection, Publish, Take, Taken

QUESTIONS = 1000
MAX_LAG = 3
MOST_LEASES, MOST_EACH = 1024, 4
"""Held at once: by all samplers, and by each of a few."""
BATCH = 128
"""Groups of a step at least; of many leases it is half, so that they are within the bound."""
COVER = 640
"""Groups between two checkpoints: 20 steps of 32, the defaults of a run."""
READY_SECONDS = 30.0


def free_address() -> str:
    """An address nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


class InstantTrainer(threading.Thread):
    """A trainer without training: takes batches as soon as they are ready, sends versions and confirms checkpoints."""

    def __init__(self, run_dir: Path, batch: int) -> None:
        super().__init__(name="trainer", daemon=True)
        self._client = IntakeConnection(socket_path(run_dir))
        self._batch = batch
        self._weights = run_dir / "weights"
        self._weights.mkdir()
        (self._weights / "config.json").write_text("{}", encoding="utf-8")
        self._ended = threading.Event()

    def send_version(self, position: int) -> None:
        version = f"1.{position // self._batch}"
        self._client.ask(Publish(version, str(self._weights), position), Done)

    def run(self) -> None:
        position = covered = 0
        with contextlib.suppress(UnavailableError):  # the intake was ended
            while not self._ended.is_set():
                if not self._client.ask(Take(position, self._batch), Taken).groups:
                    continue
                position += self._batch
                self.send_version(position)
                if position - covered >= COVER:
                    self._client.ask(Covered(position), Done)
                    covered = position

    def stop_training(self) -> None:
        self._ended.set()
        self._client.close()
        self.join()


@contextlib.contextmanager
def process(module: str, *arguments: str, log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A process of this repository, killed at the end of the block."""
    with log.open("wb") as out:
        made = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=out, stderr=out)
        try:
            yield made
        finally:
            made.send_signal(signal.SIGKILL)
            made.wait()


def ready(name: str, probe: Probe) -> None:
    asyncio.run(wait_until_ready(name, probe, READY_SECONDS))


def prepare(folder: Path) -> list[str]:
    """The files of a run in ``folder``, and the flags that name them."""
    rows = [
        {
            "data_source": "bench",
            "prompt": [{"role": "user", "content": "Which river ends in the capital of the country?"}],
            "reward_model": {"ground_truth": {"target": ["none"]}},
            "extra_info": {"split": "train", "index": index},
        }
        for index in range(QUESTIONS)
    ]
    data, model = folder / "train.jsonl", folder / "model"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}), encoding="utf-8")
    plan = {"trees": PLAN.trees, "rounds": PLAN.rounds, "expansions": PLAN.expansions, "max_turns": PLAN.max_turns}
    plan |= {"max_action_tokens": PLAN.max_action_tokens, "max_context": PLAN.max_context}
    flags = {f"rollout.{key}": str(value) for key, value in plan.items()}
    flags |= {"model.path": str(model), "data.train": str(data), "data.heldout": str(data), "run.dir": str(folder / "run")}
    return [part for key, value in flags.items() for part in (f"--{key}", value)]


@dataclass(frozen=True, slots=True)
class IngestCase:
    """One number of samplers and one size."""

    samplers: int
    size: str
    subtree_bytes: int
    intake: Sequence[Slice]
    echo: Sequence[Slice]

    def row(self) -> dict[str, Any]:
        """For the summary: medians of the slices, ratios of neighbours."""
        rate, cpu = over(self.intake, self.echo)
        middle, theirs = (sorted(side, key=lambda one: one.rate)[len(side) // 2] for side in (self.intake, self.echo))
        return {
            "samplers": self.samplers,
            "size": self.size,
            "subtree_bytes": self.subtree_bytes,
            "subtrees_per_s": round(middle.rate),
            "mb_per_s": round(middle.rate * self.subtree_bytes / 1e6, 1),
            "echo_subtrees_per_s": round(theirs.rate),
            "over_echo": round(rate, 3),
            "cpu_over_echo": round(cpu, 3),
            "cpu_us": round(1e6 * middle.cpu / middle.subtrees),
            "echo_cpu_us": round(1e6 * theirs.cpu / theirs.subtrees),
            "p99_ack_s": round(middle.p99, 4),
            "echo_p99_ack_s": round(theirs.p99, 4),
            "rss_mb": round(self.intake[-1].rss / 1e6),
            "rss_growth_mb": round((self.intake[-1].rss - self.intake[0].rss) / 1e6),
        }


def measure(samplers: int, size: str, seconds: float, seed: int) -> IngestCase:
    """Intake and echo in turns, in front of the same samplers."""
    each = max(1, min(MOST_EACH, MOST_LEASES // samplers))
    batch = max(BATCH, samplers * each // 2)
    addresses = {name: free_address() for name in ("broker", "intake", "echo", "metrics")}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        flags = prepare(folder)
        flags += ["--broker.address", addresses["broker"], "--learner.listen", addresses["intake"]]
        flags += ["--learner.metrics", addresses["metrics"], "--train.steps", "1000000"]
        flags += ["--train.batch", str(batch), "--train.max_lag", str(MAX_LAG)]
        broker = ("services.broker.server", "--broker.address", addresses["broker"])
        stack.enter_context(process(*broker, log=folder / "broker.log"))
        ready("broker", lambda: probe_broker(addresses["broker"]))
        intake = stack.enter_context(process("learner.intake", *flags, log=folder / "intake.log"))
        echo = stack.enter_context(process("bench.echo", addresses["echo"], log=folder / "echo.log"))
        ready("intake", lambda: probe_learner(addresses["intake"]))
        trainer = InstantTrainer(folder / "run", batch)
        stack.callback(trainer.stop_training)
        trainer.send_version(0)
        trainer.start()
        servers = {"intake": (addresses["intake"], intake.pid), "echo": (addresses["echo"], echo.pid)}
        arguments = {"servers": servers, "samplers": samplers, "leases": each, "size": size, "seconds": seconds, "seed": seed}
        found = subprocess.run(
            [sys.executable, "-m", "bench.simulated_samplers", json.dumps(arguments)], stdout=subprocess.PIPE, check=True
        )
        slices = {name: [Slice(**row) for row in rows] for name, rows in json.loads(found.stdout).items()}
    script = Script(SIZES[size], seed)
    return IngestCase(samplers, size, script.bytes // PLAN.leaves, slices["intake"], slices["echo"])


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Throughput of the intake and of an echo server")
    names = ("size", "samplers", "subtrees/s", "MB/s", "echo/s", "over echo", "CPU µs", "echo's", "p99 ack s", "echo's")
    for name in (*names, "RSS MB", "growth"):
        table.add_column(name, justify="right")
    keys = ("size", "samplers", "subtrees_per_s", "mb_per_s", "echo_subtrees_per_s", "over_echo", "cpu_us", "echo_cpu_us")
    for row in rows:
        table.add_row(*(str(row[key]) for key in (*keys, "p99_ack_s", "echo_p99_ack_s", "rss_mb", "rss_growth_mb")))
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ingest", description="Throughput of the intake and of an echo server.")
    parser.add_argument("--samplers", type=int, nargs="+", default=[1, 16, 128, 1000])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each slice; each server has five, the first warms up")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for samplers in given.samplers:
            rows.append(measure(samplers, size, given.seconds, given.seed).row())
            print(".", end="", file=sys.stderr, flush=True)
    show(rows)
    summary = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": given.seconds,
        "over_echo": min(row["over_echo"] for row in rows),
        "p99_ack_s": max(row["p99_ack_s"] for row in rows),
        "cases": rows,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
