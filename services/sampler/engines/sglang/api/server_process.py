"""One server as a child process: its output in a log, its last words at hand, gone when the sampler is gone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from treegrpo.errors import ConfigError, DeadlineError, EngineError, TreeGrpoError, describe
from treegrpo.runtime.child_process import ChildProcess

PAUSE_SECONDS = 0.25
USAGE = 2
"""The exit code of a program that does not take its flags."""
_BIND = re.compile(r"ERROR: +(\[Errno \d+\].*)")
"""That the address cannot be had; what SGLang says after that is about calls to itself that nobody answers."""
_CAUSE = re.compile(r"^(?:\[.*?\] )?(?:[\w.]+\.)?\w*(?:Error|Exception)\b:? ?.*")


class Child(ChildProcess):
    """A running server process."""

    whole_group = True  # SGLang's own processes look after their parent only when they have imported everything

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Self:
        """As `spawn`. Raises EngineError when this machine cannot do that now."""
        try:
            return await cls.spawn("sglang", command, environment, log)
        except OSError as error:
            raise EngineError(f"The SGLang server cannot be started ({describe(error)}); its log would be {log}.") from error

    async def ready(self, probe: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Wait until ``probe`` no longer raises.

        Raises:
            EngineError: the process ended instead, with its last words.
            ConfigError: so it did, for flags that it does not take.
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
                raise (ConfigError if self.code == USAGE else EngineError)(self.obituary())
            if not waiting.done():
                raise DeadlineError(
                    f"The SGLang server was not ready within {seconds:.0f} s; last it said: {self.last_words()} ({self.log})"
                )
            waiting.result()
        finally:
            waiting.cancel()

    def obituary(self) -> str:
        """How it ended, in a sentence."""
        code = self.code
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"The SGLang server {how}; its last words: {self.last_words()} ({self.log})"

    def last_words(self) -> str:
        """Why it could not listen, or else the last error in its log since it started, or else the last line."""
        lines = [line.strip() for line in self.read_last_lines()]
        binding = [found[1] for line in lines if (found := _BIND.search(line))]
        causes = [line for line in lines if _CAUSE.match(line)]
        return (binding or causes or lines or ["nothing"])[-1]
