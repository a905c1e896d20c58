"""A fake part of a run: ends on SIGTERM or when the run drains; SIGUSR1 triggers its fault.

--broker ADDRESS where the run state is; --follow yes: obeys it; --code N --report SENTENCE: how it ends;
--fault says: at its fault sets the run state to draining and ends; late: sets it, and ends when it is told to; else: ends.
"""

import asyncio
import os
import signal
import sys

from treegrpo.runtime.exit_report import ExitReport, write_exit_report
from treegrpo.security.credentials import OPEN
from treegrpo.wire.control import RunState, open_client, publish_state

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))


async def follow(ended: asyncio.Event) -> None:
    async with open_client(words["--broker"], OPEN) as client:
        await client.subscribe("treegrpo/test/state", qos=1)
        async for message in client.messages:
            if message.payload == b"draining":
                ended.set()


async def main() -> int:
    ended, fault = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    loop.add_signal_handler(signal.SIGUSR1, fault.set)
    tasks = [asyncio.create_task(ended.wait()), asyncio.create_task(fault.wait())]
    following = asyncio.create_task(follow(ended)) if words.get("--follow") else None
    print(f"pid {os.getpid()}", flush=True)
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if fault.is_set() and words.get("--fault"):
        await publish_state(words["--broker"], "test", RunState.DRAINING, OPEN)
        if words["--fault"] == "late":
            await ended.wait()
    for task in (*tasks, *([following] if following else [])):
        task.cancel()
    print("a checkpoint", flush=True)
    if "--report" in words:
        write_exit_report(ExitReport(int(words["--code"]), words["--report"]))
    return int(words.get("--code", "0"))


sys.exit(asyncio.run(main()))
