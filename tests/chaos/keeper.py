"""Keeps the parts running as a service manager would: what ends in any way but well is started again."""

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

from services.cli.processes.program import Child
from tests.chaos.stage import Stage

RESTART_SECONDS = 0.5
WARM_SECONDS = 60.0
GROWTH = 1.5
SLACK_BYTES = 64 << 20
"""A process may have GROWTH times what it had when it was warm, and this."""


@dataclass(slots=True)
class Life:
    """One process from start to end."""

    child: Child
    began: float
    """time.monotonic."""
    warm: int = 0
    """Bytes of memory after WARM_SECONDS; 0 before."""
    peak: int = 0
    """The most since then."""

    def weigh(self, size: int) -> None:
        if time.monotonic() - self.began > WARM_SECONDS:
            self.warm = self.warm or size
            self.peak = max(self.peak, size)


class Keeper:
    """Use as an async context manager: at the end of the block no process is left."""

    def __init__(self, stage: Stage, tasks: asyncio.TaskGroup) -> None:
        self._stage = stage
        self._group = tasks
        self._logs = stage.run_dir / "logs"
        self._logs.mkdir(parents=True)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.lives: dict[str, list[Life]] = {part: [] for part in stage.parts}
        self.restarts: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.gather(*(lives[-1].child.stop(0.0) for lives in self.lives.values() if lives))

    def keep(self, part: str) -> None:
        """Keep ``part`` running until it ends well."""
        self._tasks[part] = self._group.create_task(self._keep(part), name=f"keep-{part}")

    def stop(self, part: str) -> None:
        """End ``part`` at once, and do not start it again."""
        self._tasks[part].cancel()
        self.signal(part, signal.SIGKILL)

    def kept(self, part: str) -> bool:
        """Whether it runs, or is about to be started again."""
        return not self._tasks[part].done()

    async def end(self, parts: list[str], seconds: float) -> None:
        """Wait until these have ended well, or for ``seconds``."""
        await asyncio.wait([self._tasks[part] for part in parts], timeout=seconds)

    def child(self, part: str) -> Child | None:
        """The process that runs, None between two."""
        lives = self.lives[part]
        return lives[-1].child if lives and lives[-1].child.code is None else None

    def signal(self, part: str, number: signal.Signals) -> int | None:
        """Send a signal; the process it went to, None if there is none."""
        if (child := self.child(part)) is None:
            return None
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
        return child.pid

    async def _keep(self, part: str) -> None:
        while True:
            child = await Child.start(self._stage.program(part), self._stage.arguments(part), self._logs)
            self.lives[part].append(Life(child, time.monotonic()))
            await asyncio.shield(child.ended)
            if child.code == 0:
                return
            self.restarts[part] += 1
            await asyncio.sleep(RESTART_SECONDS)

    def weigh(self) -> None:
        """Note how much memory each process has."""
        for lives in self.lives.values():
            if lives and lives[-1].child.code is None and (size := rss(lives[-1].child.pid)):
                lives[-1].weigh(size)

    @property
    def growth(self) -> float:
        """The most that a process has grown since it was warm, as a factor; 1 if none lived so long."""
        return max((life.peak / life.warm for lives in self.lives.values() for life in lives if life.warm), default=1.0)

    def grown(self) -> list[str]:
        """The processes whose memory is beyond its bound, in words."""
        return [
            f"{part} {life.child.pid} grew from {life.warm >> 20} to {life.peak >> 20} MiB"
            for part, lives in self.lives.items()
            for life in lives
            if life.peak > GROWTH * life.warm + SLACK_BYTES
        ]


def rss(pid: int) -> int:
    """Bytes of memory a process has; 0 if it is gone."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) << 10
    return 0
