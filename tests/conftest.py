"""For all tests: examples without a deadline, signals, gRPC's late events, the order for pytest-xdist, the guard of purity."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Generator

import pytest
from hypothesis import settings

settings.register_profile("here", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("here")


def stay(_number: int, _frame: object) -> None:
    """What SIGHUP does to pytest then: nothing, as before."""


if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup, which what the tests start would take over
    signal.signal(signal.SIGHUP, stay)


def is_of_this_test(record: logging.LogRecord) -> bool:
    """False for an event of gRPC that is delivered in a later test, after the loop that waited for it was closed.

    All loops of a process share one completion queue of grpc.aio, and any of them may be handed another's event.
    """
    failed = record.exc_info[1] if record.exc_info else None
    return not (
        isinstance(failed, RuntimeError)
        and str(failed) == "Event loop is closed"
        and "PollerCompletionQueue" in record.getMessage()
    )


logging.getLogger("asyncio").addFilter(is_of_this_test)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests for ``--dist loadgroup``: whole runs first, one by one; then the other files, each on one worker.

    What takes longest must not begin last. The tests of a file share its fixtures: brokers, models, ranks.
    """
    for item in items:
        if item.get_closest_marker("whole_run") is None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: item.get_closest_marker("whole_run") is None)


class PurityGuard:
    """Audit hook that fails a test marked ``pure`` when its thread starts a process or opens a connection."""

    EVENTS = frozenset({"subprocess.Popen", "os.fork", "os.posix_spawn", "socket.connect", "socket.bind"})

    def __init__(self) -> None:
        self.active = False

    def __call__(self, event: str, _arguments: object) -> None:
        if self.active and event in self.EVENTS and threading.current_thread() is threading.main_thread():
            raise AssertionError(f"A test marked `pure` does {event}: take the mark from its file.")


_guard = PurityGuard()
sys.addaudithook(_guard)


@pytest.fixture(autouse=True)
def guard_purity(request: pytest.FixtureRequest) -> Generator[None]:
    _guard.active = request.node.get_closest_marker("pure") is not None
    yield
    _guard.active = False
