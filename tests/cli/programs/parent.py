"""Starts a waiting child as the command does, prints its pid, and waits to be killed."""

import asyncio
import sys
from pathlib import Path

from services.cli.processes.program import PartProcess, Program


async def main() -> None:
    child = await PartProcess.launch(Program("child", "tests.cli.programs.wait_for_sigterm"), [], Path(sys.argv[1]))
    print(child.pid, flush=True)
    await child.ended


asyncio.run(main())
