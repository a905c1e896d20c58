"""A server as a child process: nothing of it stays, nobody else is signalled."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from services.sampler.engines.sglang.server.server_process import SGLangProcess
from treegrpo.errors import ConfigError, UnavailableError

SECONDS = 30.0
LEADER = """
import os, signal, sys

pipe = os.open(sys.argv[1], os.O_WRONLY)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not os.fork():
    signal.alarm(60)
    signal.pause()
if sys.argv[2] == "obeys":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
os.write(pipe, b"up")
if sys.argv[2] != "ends":
    signal.pause()
"""
"""Starts a process that ignores SIGTERM; both hold a pipe."""
SAMPLER = """
import asyncio, os, sys
from pathlib import Path
from services.sampler.engines.sglang.server.server_process import SGLangProcess

async def run():
    child = await SGLangProcess.start_server([sys.executable, "-c", *sys.argv[2:]], os.environ, Path(sys.argv[1]))
    await child.ended

asyncio.run(run())
"""


@pytest.fixture
def pipe(tmp_path: Path) -> Generator[int]:
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    yield reading
    os.close(reading)


async def heard(pipe: int) -> bytes:
    """What comes through a pipe next; nothing when no process holds its other end."""
    ready, _, _ = await asyncio.to_thread(select.select, [pipe], [], [], SECONDS)
    assert ready
    return os.read(pipe, 2)


@pytest.mark.parametrize(("leader", "code"), [("ends", 0), ("obeys", -signal.SIGTERM), ("ignores", -signal.SIGKILL)])
async def test_no_process_is_left_however_the_first_of_them_ends(tmp_path: Path, pipe: int, leader: str, code: int) -> None:
    command = [sys.executable, "-c", LEADER, str(tmp_path / "pipe"), leader]
    child = await SGLangProcess.start_server(command, os.environ, tmp_path / "log")
    assert await heard(pipe) == b"up"
    if leader != "ends":
        await child.stop(0.5)
    assert await child.ended == code
    assert await heard(pipe) == b""


async def test_no_process_is_left_when_the_sampler_is_killed(tmp_path: Path, pipe: int) -> None:
    words = (SAMPLER, str(tmp_path / "log"), LEADER, str(tmp_path / "pipe"), "ignores")
    sampler = await asyncio.create_subprocess_exec(sys.executable, "-c", *words)
    assert await heard(pipe) == b"up"
    sampler.kill()
    assert await sampler.wait() == -signal.SIGKILL
    assert await heard(pipe) == b""


async def test_a_group_whose_leader_has_ended_is_signalled_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled: list[tuple[int, int]] = []

    def killpg(group: int, number: int) -> None:
        signalled.append((group, number))

    monkeypatch.setattr(os, "killpg", killpg)
    child = await SGLangProcess.start_server([sys.executable, "-c", ""], os.environ, tmp_path / "log")
    await child.ended
    await child.stop()
    await child.stop()
    assert signalled == [(child.pid, signal.SIGKILL)]


async def test_an_address_in_use_is_the_error_whatever_is_logged_later(tmp_path: Path) -> None:
    code = "print('ERROR:    [Errno 98] address already in use', 'TimeoutError: timed out', sep=chr(10)); raise SystemExit(1)"
    child = await SGLangProcess.start_server([sys.executable, "-c", code], os.environ, tmp_path / "log")
    await child.ended
    assert "ended with exit code 1; last error: [Errno 98] address already in use" in child.exit_message()


async def test_unknown_flags_are_a_config_error(tmp_path: Path) -> None:
    async def never() -> None:
        raise UnavailableError("Nobody answers.")

    code = "import argparse; argparse.ArgumentParser(prog='serve').parse_args(['--nonsense'])"
    child = await SGLangProcess.start_server([sys.executable, "-c", code], os.environ, tmp_path / "log")
    with pytest.raises(ConfigError, match="serve: error: unrecognized arguments: --nonsense"):
        await child.wait_until_ready(never, SECONDS)
