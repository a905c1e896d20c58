"""An SGLang server as a child process: its output in a log, ended with the sampler."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from treegrpo.errors import ConfigError, DeadlineError, EngineError, TreeGrpoError, describe
from treegrpo.runtime.child_process import ChildProcess

PROBE_INTERVAL_SECONDS = 0.25
USAGE_EXIT_CODE = 2
"""Of a program that does not know its flags."""
_BIND_ERROR = re.compile(r"ERROR: +(\[Errno \d+\].*)")
"""That the address cannot be bound; later log lines are about SGLang's own unanswered calls to itself."""
_ERROR_LINE = re.compile(r"^(?:\[.*?\] )?(?:[\w.]+\.)?\w*(?:Error|Exception)\b:? ?.*")


class SGLangProcess(ChildProcess):
    """A running server process."""

    whole_group = True  # SGLang's own processes look after their parent only when they have imported everything

    @classmethod
    async def start_server(cls, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Self:
        """Start the server process, as `spawn`. Raises EngineError if the machine cannot do that now."""
        try:
            return await cls.spawn("sglang", command, environment, log)
        except OSError as error:
            raise EngineError(f"The SGLang server cannot be started ({describe(error)}); its log would be {log}.") from error

    async def wait_until_ready(self, probe: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Wait until ``probe`` no longer raises.

        Raises:
            EngineError: the process ended; with its last error.
            ConfigError: the process ended because it does not know its flags.
            DeadlineError: it did not become ready in time.
        """

        async def poll() -> None:
            while True:
                with suppress(TreeGrpoError):
                    return await probe()
                await asyncio.sleep(PROBE_INTERVAL_SECONDS)

        waiting = asyncio.create_task(poll(), name="sglang-ready")
        try:
            await asyncio.wait({waiting, self.ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                raise (ConfigError if self.code == USAGE_EXIT_CODE else EngineError)(self.exit_message())
            if not waiting.done():
                raise DeadlineError(
                    f"The SGLang server was not ready within {seconds:.0f} s; last error: {self.last_error()} ({self.log})"
                )
            waiting.result()
        finally:
            waiting.cancel()

    def exit_message(self) -> str:
        """How the process ended, in a sentence."""
        code = self.code
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"The SGLang server {how}; last error: {self.last_error()} ({self.log})"

    def last_error(self) -> str:
        """Why it could not listen, or else the last error in its log since it started, or else the last line."""
        lines = [line.strip() for line in self.read_last_lines()]
        binding = [found[1] for line in lines if (found := _BIND_ERROR.search(line))]
        causes = [line for line in lines if _ERROR_LINE.match(line)]
        return (binding or causes or lines or ["nothing"])[-1]
