"""Real SGLang servers for tests, started once for each kind of model and given whatever weights a test needs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from services.sampler.engines.sglang import EngineRequirements, SGLangEngine, open_remote
from services.sampler.engines.sglang.server.launch_command import ServerLaunch, SGLangInstallation
from services.sampler.engines.sglang.server.timings import TIMINGS, SGLangTimings
from tests.engines import builders
from tests.ports import free_ports
from treegrpo.core.step import PolicyVersion
from treegrpo.runtime.parent_death import parent_bound_command

PYTHON = Path(os.environ.get("SGLANG_PYTHON", ".venv-sglang/bin/python")).absolute()
CONTEXT = 512
READY_SECONDS = 180.0
WEIGHTS_DIR = Path("/dev/shm")


def launch(**changes: object) -> ServerLaunch:
    """A small server on the CPU."""
    shape: dict[str, object] = {
        "installation": SGLangInstallation(PYTHON, cuda=False),
        "context": CONTEXT,
        "max_running": 64,
        "cache_tokens": 8192,
        "dtype": "float32",
        "threads": 1,
        "seed": 0,
        "flags": ("--log-level", "warning"),
    }
    return ServerLaunch(**{**shape, **changes})  # pyright: ignore[reportArgumentType]


@dataclass
class RunningServer:
    """A server process."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class ServerPool:
    """Servers by the kind of model they were started with."""

    root: Path
    running: dict[str, RunningServer] = field(default_factory=dict[str, RunningServer])

    def url(self, kind: str) -> str:
        """A server that takes weights of ``kind``; its own end-of-sequence tokens are none."""
        if kind not in self.running:
            self.running[kind] = self.start_server(self.model(kind))
        return self.running[kind].url

    def model(self, kind: str) -> Path:
        """Weights that no test asks for, with a tokenizer that knows no end of a sequence."""
        path = self.root / kind
        if not path.exists():
            builders.save_model(path, kind, seed=99, end=None)
        return path

    def start_server(self, path: Path, port: int = 0) -> RunningServer:
        """Start a server on ``path`` and wait until it is healthy."""
        port = port or free_ports(1)[0]
        plan, log = launch(), self.root / f"{path.name}-{port}.log"
        command = parent_bound_command(plan.command_line(path, "0.0", "127.0.0.1", port))
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=plan.environment(), stdout=out, stderr=out, start_new_session=True)
        running, deadline = RunningServer(f"http://127.0.0.1:{port}", process), time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"{running.url}/health", timeout=30, trust_env=False).is_success:
                    return running
            except httpx.HTTPError:
                time.sleep(0.2)
        running.kill()
        raise AssertionError(log.read_text()[-3000:])

    def stop_servers(self) -> None:
        for running in self.running.values():
            running.kill()


def requirements(path: Path, **changes: object) -> EngineRequirements:
    shape: dict[str, object] = {
        "model": path,
        "version": PolicyVersion(0, 0),
        "context": CONTEXT,
        "max_running": 64,
        "weights_dir": WEIGHTS_DIR,
    }
    return EngineRequirements(**{**shape, **changes})  # pyright: ignore[reportArgumentType]


@asynccontextmanager
async def remote(path: Path, *urls: str, timings: SGLangTimings = TIMINGS, **changes: object) -> AsyncGenerator[SGLangEngine]:
    """The engine on servers that run already."""
    async with await open_remote(requirements(path, **changes), urls, verify=True, timings=timings) as engine:
        yield engine
