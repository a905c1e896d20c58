"""One server as a child process: its output in a log, its last words at hand, gone when the sampler is gone."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from treegrpo.errors import DeadlineError, EngineError, TreeGrpoError
from treegrpo.leash import leashed

PAUSE_SECONDS = 0.25
TAIL_BYTES = 65536
GRACE_SECONDS = 5.0
_BIND = re.compile(r"ERROR: +(\[Errno \d+\].*)")
"""That the address cannot be had; what SGLang says after that is about calls to itself that nobody answers."""
_CAUSE = re.compile(r"^(?:\[.*?\] )?(?:[\w.]+\.)?\w*(?:Error|Exception)\b:? ?.*")


class Child:
    """A running server process, in a session of its own."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, offset: int) -> None:
        self.log = log
        self._process = process
        self._offset = offset
        self.ended = asyncio.create_task(self._until_ended(), name=f"end-of-sglang-{process.pid}")

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Self:
        """Run ``command``; what it says is appended to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *leashed(list(command)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=dict(environment),
            )
            return cls(process, log, out.tell())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self, probe: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Wait until ``probe`` no longer raises.

        Raises:
            EngineError: the process ended instead, with its last words.
            DeadlineError: it did not become ready in time.
        """

        async def answers() -> None:
            while True:
                with suppress(TreeGrpoError):
                    return await probe()
                await asyncio.sleep(PAUSE_SECONDS)

        waiting = asyncio.create_task(answers(), name="sglang-ready")
        try:
            await asyncio.wait({waiting, self.ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                raise EngineError(self.obituary())
            if not waiting.done():
                raise DeadlineError(
                    f"The SGLang server was not ready within {seconds:.0f} s; last it said: {self.last_words()} ({self.log})"
                )
            waiting.result()
        finally:
            waiting.cancel()

    async def _until_ended(self) -> int:
        code = await self._process.wait()
        # At once: when none of the group is left, the kernel may give its number to a stranger.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return code

    async def stop(self) -> None:
        """Ask it to end, then kill it. What it has started is killed when it has ended, however it did."""
        for wish, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, wish)
            await asyncio.wait({self.ended}, timeout=patience)

    def obituary(self) -> str:
        """How it ended, in a sentence."""
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"The SGLang server {how}; its last words: {self.last_words()} ({self.log})"

    def last_words(self) -> str:
        """Why it could not listen, or else the last error in its log since it started, or else the last line."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._offset, size - TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        binding = [found[1] for line in lines if (found := _BIND.search(line))]
        causes = [line for line in lines if _CAUSE.match(line)]
        return (binding or causes or lines or ["nothing"])[-1]
