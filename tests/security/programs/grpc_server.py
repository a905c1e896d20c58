"""The intake's gRPC server as a process of ours, until its input ends: ``python -m tests.security.programs.grpc_server DIR``."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.security.credential_builders import access
from tests.security.grpc_server_harness import serving
from treegrpo.config.security import Role
from treegrpo.observability import log_setup
from treegrpo.observability.native_log import filter_native_log
from treegrpo.observability.standard_streams import make_streams_lossy


async def main(folder: Path) -> None:
    async with serving(access(folder, Role.LEARNER)) as fixture:
        print(fixture.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    make_streams_lossy()
    log_setup.log_to_stderr()
    if os.environ["GRPC_VERBOSITY"] != "NONE":
        filter_native_log()
    asyncio.run(main(Path(sys.argv[1])))
