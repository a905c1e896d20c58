"""A small run with each part a process of its own, all of which can be killed at a chosen moment and started again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from services.cli.processes.program import Child, Program
from services.cli.processes.readiness import broker_ready, wait_ready
from tests.chaos.audit import Audit, audit
from tests.chaos.history import Archive, steps_written
from tests.cli.workbench import Workbench
from treegrpo.errors import UnavailableError

Moment = Callable[[], bool]
"""Whether it is now."""
LOOK_SECONDS = 0.002
SECONDS = 100.0
"""Until a moment comes, the start of all parts included."""


class House:
    """Use as an async context manager: at the end of the block no process is left."""

    def __init__(self, folder: Path, samplers: int, keys: Mapping[str, str]) -> None:
        folder.mkdir()
        self._bench = Workbench(folder)
        self.run_dir = self._bench.run_dir
        self._arguments = [*self._bench.flags(), *(word for key, value in keys.items() for word in (f"--{key}", value))]
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._broker = Program("broker", "services.broker.server")
        self._parts = [
            Program("trainer", "learner.trainer"),
            Program("intake", "learner.intake"),
            Program("retriever", "services.retriever"),
            *(Program(f"s{n}", "services.sampler", ("--sampler.id", f"s{n}")) for n in range(samplers)),
        ]
        self._children: dict[str, Child] = {}
        (self.run_dir / "journal").mkdir(parents=True)
        self._archive = Archive(self.run_dir / "journal", folder / "archive")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.kill()

    async def start(self) -> None:
        """Start all parts."""
        await self._start(self._broker)
        await wait_ready("broker", lambda: broker_ready(self._bench.keys["broker.address"]), SECONDS)
        for part in self._parts:
            await self._start(part)

    async def _start(self, part: Program) -> None:
        self._children[part.name] = await Child.start(part, self._arguments, self._logs)

    async def kill(self) -> None:
        """SIGKILL to all at once."""
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        await asyncio.gather(*(child.ended for child in self._children.values()))
        self._archive.keep()
        self._children.clear()

    async def until(self, moment: Moment) -> None:
        """Return at ``moment``, or at the end of the run: on a slow machine a moment may be over before anybody has looked.

        Raises UnavailableError: a part ended otherwise, or the moment does not come.
        """
        deadline = time.monotonic() + SECONDS
        while not (moment() or self._children["trainer"].code == 0):
            self._archive.keep()
            for child in self._children.values():
                if child.code is not None:
                    raise UnavailableError(child.obituary())
            if time.monotonic() > deadline:
                raise UnavailableError(f"The moment did not come within {SECONDS:.0f} s; see {self._logs}.")
            await asyncio.sleep(LOOK_SECONDS)

    async def complete(self) -> Audit:
        """Wait until the trainer has ended well; the audit of the whole run."""
        await self.until(lambda: False)
        await self.kill()
        return audit(self.run_dir, self._archive, ended=True)

    # ---- moments

    def recorded(self, steps: int) -> Moment:
        """So many more steps than now are in the progress file."""
        progress = self.run_dir / "progress.jsonl"
        due = steps_written(progress) + steps
        return lambda: steps_written(progress) >= due

    def journaled(self, size: int) -> Moment:
        """The journal has grown by so many bytes."""
        due = self._journal_bytes() + size
        return lambda: self._journal_bytes() >= due

    def writing(self, what: str) -> Moment:
        """A policy version or a checkpoint, that is "weights" or "checkpoints", is half written."""
        return lambda: any((self.run_dir / what).glob(".*.partial"))

    def _journal_bytes(self) -> int:
        total = 0
        for path in (self.run_dir / "journal").iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def moments(self, chance: random.Random) -> Iterator[Moment]:
        """One of each kind in a random order, for ever; each is reckoned from when it is asked for."""
        while True:
            kinds = [
                lambda: self.recorded(1),
                lambda: self.journaled(chance.randrange(1, 30_000)),
                lambda: self.writing("weights"),
                lambda: self.writing("checkpoints"),
            ]
            for kind in chance.sample(kinds, len(kinds)):
                yield kind()


def trained(found: Audit) -> list[str]:
    """The ids of the groups that the steps that count have trained, in order."""
    return [group for line in found.chain for group in line["group_ids"]]
