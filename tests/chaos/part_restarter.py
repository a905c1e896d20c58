"""Runs the parts as a service manager would: what ends with an error is restarted; and records their memory."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from services.cli.processes.program import PartProcess
from tests.chaos.chaos_run import ChaosRun

RESTART_SECONDS = 0.5
WARM_SECONDS = 60.0
GROWTH = 1.5
SLACK_BYTES = 64 << 20
"""A process may have GROWTH times what it had when it was warm, and this."""


@dataclass(slots=True)
class ProcessLifetime:
    """Memory of one process from start to end."""

    child: PartProcess
    began: float
    """time.monotonic."""
    warm: int = 0
    """Bytes of memory after WARM_SECONDS; 0 before."""
    peak: int = 0
    """The most since then."""

    def record_size(self, size: int) -> None:
        if time.monotonic() - self.began > WARM_SECONDS:
            self.warm = self.warm or size
            self.peak = max(self.peak, size)


class PartRestarter:
    """Use as an async context manager: at the end of the block no process is left."""

    def __init__(self, run: ChaosRun, tasks: asyncio.TaskGroup) -> None:
        self._run = run
        self._group = tasks
        self._logs = run.run_dir / "logs"
        self._logs.mkdir(parents=True)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.lifetimes: dict[str, list[ProcessLifetime]] = {part: [] for part in run.parts}
        self.restarts: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.gather(*(lives[-1].child.stop(0.0) for lives in self.lifetimes.values() if lives))

    def start_part(self, part: str) -> None:
        """Run ``part`` until it ends with code 0."""
        self._tasks[part] = self._group.create_task(self._restart(part), name=f"restart-{part}")

    def stop_part(self, part: str) -> None:
        """End ``part`` at once, and do not start it again."""
        self._tasks[part].cancel()
        self.send_signal(part, signal.SIGKILL)

    def is_supervised(self, part: str) -> bool:
        """Whether it runs, or is about to be started again."""
        return not self._tasks[part].done()

    async def wait_for_end(self, parts: list[str], seconds: float) -> None:
        """Wait until these have ended well, or for ``seconds``."""
        await asyncio.wait([self._tasks[part] for part in parts], timeout=seconds)

    def running_process(self, part: str) -> PartProcess | None:
        """The process that runs, None between two."""
        lives = self.lifetimes[part]
        return lives[-1].child if lives and lives[-1].child.code is None else None

    def send_signal(self, part: str, number: signal.Signals) -> int | None:
        """Send a signal; the process it went to, None if there is none."""
        if (child := self.running_process(part)) is None:
            return None
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
        return child.pid

    async def _restart(self, part: str) -> None:
        while True:
            child = await PartProcess.launch(self._run.program(part), self._run.arguments(part), self._logs)
            self.lifetimes[part].append(ProcessLifetime(child, time.monotonic()))
            await asyncio.shield(child.ended)
            if child.code == 0:
                return
            self.restarts[part] += 1
            await asyncio.sleep(RESTART_SECONDS)

    def record_memory(self) -> None:
        """Note how much memory each process has."""
        for lives in self.lifetimes.values():
            if lives and lives[-1].child.code is None and (size := resident_bytes(lives[-1].child.pid)):
                lives[-1].record_size(size)

    @property
    def growth(self) -> float:
        """The most that a process has grown since it was warm, as a factor; 1 if none lived so long."""
        return max((life.peak / life.warm for lives in self.lifetimes.values() for life in lives if life.warm), default=1.0)

    def memory_leaks(self) -> list[str]:
        """The processes whose memory is beyond its bound, in words."""
        return [
            f"{part} {life.child.pid} grew from {life.warm >> 20} to {life.peak >> 20} MiB"
            for part, lives in self.lifetimes.items()
            for life in lives
            if life.peak > GROWTH * life.warm + SLACK_BYTES
        ]


def resident_bytes(pid: int) -> int:
    """Bytes of memory a process has; 0 if it is gone."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) << 10
    return 0
