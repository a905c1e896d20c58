"""What lets tests run side by side and lets `make check` be quick."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from itertools import combinations

import pytest

from tests.ports import PORTS, share_of


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_no_two_workers_use_the_same_port(workers: int) -> None:
    shares = [set(share_of(PORTS, f"gw{number}", workers)) for number in range(workers)]
    assert all(one.isdisjoint(other) for one, other in combinations(shares, 2))
    assert all(share <= set(PORTS) and len(share) > 1000 for share in shares)


@pytest.mark.pure
def test_a_pure_test_starts_no_process_and_opens_no_connection() -> None:
    with pytest.raises(AssertionError, match=r"marked `pure` does subprocess\.Popen"):
        subprocess.Popen(["true"])
    with pytest.raises(AssertionError, match=r"marked `pure` does socket\.connect"), socket.socket() as one:
        one.connect(("127.0.0.1", 9))


@pytest.mark.pure
async def test_a_pure_test_may_have_an_event_loop() -> None:
    await asyncio.to_thread(lambda: None)
