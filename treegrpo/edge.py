"""The edge of every process: arguments in; one sentence and an exit code out.

0     the end of its work, or it drained as it was told
2     an error that stays until somebody does something: configuration, data, model, a taken port, a damaged journal
75    an error that may pass: a peer that does not answer, a deadline; start it again
else  a crash, or a signal; start it again
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

from treegrpo import logs
from treegrpo.config import Config
from treegrpo.errors import TreeGrpoError
from treegrpo.printable_text import printable
from treegrpo.settings import from_arguments

ERROR_MARK = "error: "
"""What a process's last words begin with."""
FAILED = 2
PASSING = 75
"""EX_TEMPFAIL of sysexits.h."""


def run_service(service: Callable[[Config], Coroutine[Any, Any, None]], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``service`` as this process: configuration, logging, SIGTERM and SIGINT as a cancellation, the exit code.

    Example:
        if __name__ == "__main__":
            run_service(serve)
    """
    logs.to_stderr()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request
    try:
        config = from_arguments(sys.argv[1:] if arguments is None else arguments)
        asyncio.run(_until_told(service(config)))
    except BaseException as error:  # noqa: BLE001  # the edge: what is not ours is raised again
        raise SystemExit(complain(error)) from None
    raise SystemExit(0)


def complain(error: BaseException) -> int:
    """Print the sentence of an error of ours and return the exit code; raise any other again."""
    ours = find(error)
    if ours is None:
        raise error
    if logs.as_json():
        logs.to_stderr()
        logging.getLogger(__name__).critical("%s", " ".join([str(ours), *getattr(ours, "__notes__", ())]))
    else:
        lines = [f"{ERROR_MARK}{ours}", *getattr(ours, "__notes__", ())]  # notes say how to go on
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    return exit_code(ours)


def exit_code(error: TreeGrpoError) -> int:
    """What a process ends with after ``error``."""
    return PASSING if error.passes else FAILED


def find(error: BaseException) -> TreeGrpoError | None:
    """The first error of ours in ``error``, which a task group may have wrapped."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := find(inner))), None)
    return error if isinstance(error, TreeGrpoError) else None


async def _until_told(service: Coroutine[Any, Any, None]) -> None:
    """Await ``service``; a signal cancels it, which is a normal end."""
    task = asyncio.ensure_future(service)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        logging.getLogger(__name__).info("told to stop")
