"""A small run with each part in a process of its own, which can be killed at a chosen moment and started again."""

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

from services.cli.processes.program import PartProcess, Program
from services.cli.processes.readiness import probe_broker, wait_until_ready
from tests.chaos.audit import RunAudit, audit_run
from tests.chaos.run_records import JournalArchive, steps_written
from tests.cli.small_run import SmallRun
from treegrpo.errors import UnavailableError

Moment = Callable[[], bool]
"""Whether it is now."""
LOOK_SECONDS = 0.002
SECONDS = 100.0
"""Until a moment comes, the start of all parts included."""


class RunFixture:
    """Use as an async context manager: at the end of the block no process is left."""

    def __init__(self, folder: Path, samplers: int, keys: Mapping[str, str]) -> None:
        folder.mkdir()
        self._small_run = SmallRun(folder)
        self.run_dir = self._small_run.run_dir
        self._arguments = [*self._small_run.flags(), *(word for key, value in keys.items() for word in (f"--{key}", value))]
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._broker = Program("broker", "services.broker.server")
        self._parts = [
            Program("trainer", "learner.trainer"),
            Program("intake", "learner.intake"),
            Program("retriever", "services.retriever"),
            *(Program(f"s{n}", "services.sampler", ("--sampler.id", f"s{n}")) for n in range(samplers)),
        ]
        self._children: dict[str, PartProcess] = {}
        (self.run_dir / "journal").mkdir(parents=True)
        self._archive = JournalArchive(self.run_dir / "journal", folder / "archive")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.kill_parts()

    async def start_parts(self) -> None:
        """Start all parts."""
        await self._launch(self._broker)
        await wait_until_ready("broker", lambda: probe_broker(self._small_run.keys["broker.address"]), SECONDS)
        for part in self._parts:
            await self._launch(part)

    async def _launch(self, part: Program) -> None:
        self._children[part.name] = await PartProcess.launch(part, self._arguments, self._logs)

    async def kill_parts(self) -> None:
        """SIGKILL to all at once."""
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        await asyncio.gather(*(child.ended for child in self._children.values()))
        self._archive.link_new_segments()
        self._children.clear()

    async def wait_for_moment(self, moment: Moment) -> None:
        """Return at ``moment``, or at the end of the run: on a slow machine a moment may be over before anybody has looked.

        Raises UnavailableError: a part ended otherwise, or the moment does not come.
        """
        deadline = time.monotonic() + SECONDS
        while not (moment() or self._children["trainer"].code == 0):
            self._archive.link_new_segments()
            for child in self._children.values():
                if child.code is not None:
                    raise UnavailableError(child.describe_exit())
            if time.monotonic() > deadline:
                raise UnavailableError(f"The moment did not come within {SECONDS:.0f} s; see {self._logs}.")
            await asyncio.sleep(LOOK_SECONDS)

    async def wait_for_completion(self) -> RunAudit:
        """Wait until the trainer has ended well; the audit of the whole run."""
        await self.wait_for_moment(lambda: False)
        await self.kill_parts()
        return audit_run(self.run_dir, self._archive, ended=True)

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


def trained_groups(found: RunAudit) -> list[str]:
    """The ids of the groups that the steps that count have trained, in order."""
    return [group for line in found.chain for group in line["group_ids"]]
