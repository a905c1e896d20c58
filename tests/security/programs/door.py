"""The intake's gRPC door as a process of ours: ``python -m tests.security.programs.door CERTIFICATES``, until its input ends."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.security.door import serving
from tests.security.people import access
from treegrpo.config.security import Role
from treegrpo.observability import log_setup
from treegrpo.observability.native_log import filter_native_log
from treegrpo.observability.standard_streams import make_streams_lossy


async def main(folder: Path) -> None:
    async with serving(access(folder, Role.LEARNER)) as door:
        print(door.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    make_streams_lossy()
    log_setup.log_to_stderr()
    if os.environ["GRPC_VERBOSITY"] != "NONE":
        filter_native_log()
    asyncio.run(main(Path(sys.argv[1])))
