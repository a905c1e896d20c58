"""The servers under test, each a process of its own as users run it, in plain text on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from services.cli.processes.readiness import probe_broker, probe_learner, probe_retriever, wait_until_ready
from tests.fuzz.loop_watchdog import STALL_MESSAGE
from tests.intake.process_harness import IntakeProcess
from tests.ports import free_address
from treegrpo.config.schema import Config, RetrieverConfig
from treegrpo.net.local_socket import socket_path
from treegrpo.wire.trainer_protocol import Done, Publish

SECONDS = 60.0
UNEXPECTED = re.compile(r"Traceback|Segmentation|never retrieved|never awaited|Fatal error")
"""What a log has of an error that nobody handles."""


@dataclass
class ServerProcess:
    name: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def mib(self) -> float:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    @property
    def unexpected_errors(self) -> list[str]:
        text = self.log.read_text(errors="replace")
        return [text[max(0, found.start() - 200) : found.end() + 1500] for found in UNEXPECTED.finditer(text)]

    @property
    def stalls(self) -> int:
        """How often its event loop stalled, by its watchdog."""
        return self.log.read_text(errors="replace").count(STALL_MESSAGE)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


@dataclass
class FuzzedServers:
    """The server processes and their addresses."""

    intake: IntakeProcess
    retriever: str
    servers: dict[str, ServerProcess]

    @property
    def socket(self) -> str:
        return socket_path(self.intake.run_dir)


async def _start(name: str, folder: Path, *command: str) -> ServerProcess:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.fuzz.loop_watchdog", *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )
    return ServerProcess(name, process, log)


@contextlib.asynccontextmanager
async def fuzzed_servers(folder: Path) -> AsyncGenerator[FuzzedServers]:
    """Broker, retriever and intake, which serves a policy version."""
    (folder / "run").mkdir(parents=True)
    intake, retriever = IntakeProcess(folder, free_address()), free_address()
    (folder / "corpus.jsonl").write_text(json.dumps({"id": "0", "contents": "Kabul\nKabul is a large city."}) + "\n")
    where = ("--broker.address", intake.broker)
    search = ("--retriever.listen", retriever, "--retriever.corpus", str(folder / "corpus.jsonl"))
    servers: dict[str, ServerProcess] = {}
    try:
        servers["broker"] = await _start("broker", folder, "services.broker.server", *where)
        servers["retriever"] = await _start("retriever", folder, "services.retriever", *search)
        await wait_until_ready("broker", lambda: probe_broker(intake.broker), SECONDS)
        servers["intake"] = await _start("intake", folder, "learner.intake", *intake.flags)
        await wait_until_ready("retriever", lambda: probe_retriever(Config(retriever=RetrieverConfig(listen=retriever))), SECONDS)
        await wait_until_ready("intake", lambda: probe_learner(intake.listen), SECONDS)
        weights = intake.run_dir / "weights" / "1.0"
        weights.mkdir(parents=True)
        (weights / "config.json").write_text("{}")
        async with intake.trainer() as trainer:
            await asyncio.to_thread(trainer.ask, Publish("1.0", str(weights), 0), Done)
        yield FuzzedServers(intake, retriever, servers)
    finally:
        for server in servers.values():
            if server.alive:
                server.process.kill()
            await server.process.wait()
