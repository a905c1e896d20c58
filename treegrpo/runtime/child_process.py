"""Child process: is killed when its parent ends, runs in its own session, and writes its output to a log file."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

from treegrpo.runtime.parent_death import parent_bound_command

TAIL_BYTES = 65536
GRACE_SECONDS = 5.0


class ChildProcess:
    """A running program. In its own session, so that a terminal's Ctrl-C reaches only its parent."""

    whole_group: ClassVar[bool] = False
    """Whether its own child processes are killed with it, even when this process is killed."""
    killed_seconds: ClassVar[float | None] = None
    """To wait for one that was killed, which a device may hold for ever; None: as long as it takes."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, offset: int) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._offset = offset
        self.ended = asyncio.create_task(self._until_ended(), name=f"end-of-{name}")

    @classmethod
    async def spawn(cls, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Self:
        """Run ``command``; its output is appended to ``log``, or dropped if that cannot be opened."""
        with _appending(log) as out:
            process = await asyncio.create_subprocess_exec(
                *parent_bound_command(command, group=cls.whole_group),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=environment,
            )
            return cls(name, process, log, out.tell())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; negative after a signal, None while it runs."""
        return self._process.returncode

    async def _until_ended(self) -> int:
        code = await self._process.wait()
        # At once: when none of the group is left, the kernel may reuse its number.
        self._tell_group(signal.SIGKILL)
        return code

    async def stop(self, grace: float = GRACE_SECONDS, at_once: asyncio.Event | None = None) -> None:
        """Send SIGTERM; kill it after ``grace`` seconds, or as soon as ``at_once`` is set.

        What it has started is killed when it has ended, however it did.
        """
        hurry = asyncio.create_task((at_once or asyncio.Event()).wait(), name=f"hurry-{self.name}")
        if self.code is None:
            self._tell_group(signal.SIGTERM)
        try:
            await asyncio.wait({self.ended, hurry}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()
        if self.code is None:
            self._tell_group(signal.SIGKILL)
        await asyncio.wait({self.ended}, timeout=self.killed_seconds)

    def _tell_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def read_last_lines(self) -> list[str]:
        """The last lines of its log since it started, without blank ones; none if the log cannot be read."""
        try:
            with self.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._offset, size - TAIL_BYTES))
                return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return []


def _appending(log: Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError:  # a full disk; what it has to say is worth less than what it does
        return Path(os.devnull).open("ab")
