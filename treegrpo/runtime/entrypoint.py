"""Entry point of every service process: reads the configuration, runs the service, prints the error, sets the exit code.

0     the end of its work, or it drained as it was told
2     a permanent error, which an operator has to fix: configuration, data, model, a taken port, a damaged journal
75    a transient error: a peer that does not answer, a deadline; start it again
else  a crash, or a signal; start it again

The sentence goes to standard error for people, and to the process that started this one as an exit report.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from treegrpo.config.loader import config_from_arguments
from treegrpo.config.schema import Config
from treegrpo.errors import TreeGrpoError
from treegrpo.observability import log_setup
from treegrpo.observability.printable_text import printable
from treegrpo.runtime.exit_report import FAILED, TRANSIENT, exit_code, exit_report_for, write_exit_report
from treegrpo.runtime.stop_signals import stop_signals

__all__ = ["ERROR_PREFIX", "FAILED", "TRANSIENT", "exit_code", "find_own_error", "report_error", "run_service"]
ERROR_PREFIX = "error: "
"""What the sentence begins with on standard error."""
log = logging.getLogger(__name__)


def run_service(service: Callable[[Config], Coroutine[Any, Any, None]], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``service`` as this process: configuration, logging, stop signals as a cancellation, the exit code.

    Example:
        if __name__ == "__main__":
            run_service(serve)
    """
    log_setup.log_to_stderr()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request
    try:
        config = config_from_arguments(sys.argv[1:] if arguments is None else arguments)
        asyncio.run(_run_until_stopped(service(config)))
    except BaseException as error:  # noqa: BLE001  # the edge: what is not ours is raised again
        raise SystemExit(report_error(error)) from None
    raise SystemExit(0)


def report_error(error: BaseException) -> int:
    """Report an error of ours, print its sentence and return the exit code; report any other as a crash and raise it again."""
    ours = find_own_error(error)
    if ours is None:
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            write_exit_report(exit_report_for(error))
        raise error
    write_exit_report(exit_report_for(ours))
    for other in _leaf_errors(error):  # a crash beside it is not lost
        if not isinstance(other, TreeGrpoError | asyncio.CancelledError):
            log.error("another exception was raised as well: %s", other, exc_info=other)
    if log_setup.is_json_format():
        log_setup.log_to_stderr()
        log.critical("%s", " ".join([str(ours), *getattr(ours, "__notes__", ())]))
    else:
        lines = [f"{ERROR_PREFIX}{ours}", *getattr(ours, "__notes__", ())]  # notes say how to go on
        with suppress(OSError):  # the reader has gone
            print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    return exit_code(ours)


def find_own_error(error: BaseException) -> TreeGrpoError | None:
    """The TreeGrpoError in ``error``, which a task group may have wrapped: a permanent one before a transient one."""
    return min(
        (one for one in _leaf_errors(error) if isinstance(one, TreeGrpoError)), key=lambda one: one.is_transient, default=None
    )


def _leaf_errors(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaf_errors(inner)
    else:
        yield error


async def _run_until_stopped(service: Coroutine[Any, Any, None]) -> None:
    """Await ``service``; a stop signal cancels it, which is a normal end. A cancellation without a signal is a crash."""
    task, stopping = asyncio.ensure_future(service), asyncio.Event()

    def stop() -> None:
        stopping.set()
        task.cancel()

    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise RuntimeError("The service was cancelled without a stop signal.") from None
        log.info("received a stop signal")
