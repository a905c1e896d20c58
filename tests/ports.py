"""Ports nobody listens on, for parts that a test starts, kills and starts again at the same place."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack

PORTS = range(20000, 32000)
"""Below those that systems give to outgoing connections: a part that starts again finds its port free."""


def share_of(ports: range, worker: str, workers: int) -> range:
    """The ports of one pytest-xdist worker, "gw0" to "gwN": no two workers ask for the same ones."""
    size = len(ports) // workers
    first = int(worker.removeprefix("gw")) * size
    return ports[first : first + size]


_own = share_of(PORTS, os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_random = random.Random()
_given = set[int]()


def free_ports(count: int) -> list[int]:
    """Neighbouring ports that nobody listens on; never the same to two who ask."""
    while True:
        first = _random.choice(_own[: len(_own) - count + 1])
        ports = range(first, first + count)
        if not _given.isdisjoint(ports):
            continue
        with ExitStack() as stack:
            try:
                for port in ports:
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        _given.update(ports)
        return list(ports)


def free_address() -> str:
    """An address nobody listens on."""
    return f"127.0.0.1:{free_ports(1)[0]}"
