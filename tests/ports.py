"""Ports nobody listens on, for parts that a test starts, kills and starts again at the same place."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

PORTS = range(20000, 32000)
"""Below those that systems give to outgoing connections: a part that starts again finds its port free."""
_chance = random.Random()
_given = set[int]()


def free_ports(count: int) -> list[int]:
    """Neighbouring ports that nobody listens on; never the same to two who ask."""
    while True:
        first = _chance.choice(PORTS)
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
