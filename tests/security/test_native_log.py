"""What gRPC's own log writes of strangers: nothing, or a few escaped lines where somebody has asked for it."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path

import pytest

from treegrpo.observability.native_log import LINE_BYTES
from treegrpo.observability.printable_text import UNPRINTABLE
from treegrpo.observability.rate_limited_log import LINES
from treegrpo.runtime.process_environment import child_environment, python_command

KNOCKS = 200
SECONDS = 60.0
NAME = b"A\x1b[31m\nerror: forged " + 200 * b"x"


def client_hello(name: bytes) -> bytes:
    """The first message of TLS 1.3, for a server called ``name``."""

    def sized(data: bytes, size: int) -> bytes:
        return len(data).to_bytes(size, "big") + data

    key = b"\x04" + os.urandom(64)
    extensions = {
        0: sized(b"\0" + sized(name, 2), 2),  # server name
        10: sized(struct.pack("!H", 23), 2),  # groups
        13: sized(struct.pack("!HH", 0x0403, 0x0804), 2),  # signatures
        43: sized(struct.pack("!H", 0x0304), 1),  # versions
        51: sized(struct.pack("!H", 23) + sized(key, 2), 2),  # key share
    }
    said = b"".join(struct.pack("!H", kind) + sized(data, 2) for kind, data in extensions.items())
    body = b"\x03\x03" + os.urandom(32) + b"\0" + sized(b"\x13\x01\x13\x02", 2) + b"\x01\0" + sized(said, 2)
    return b"\x16\x03\x01" + sized(b"\x01" + sized(body, 3), 2)


def knock(address: str, times: int) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(times):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(client_hello(NAME))
            connection.recv(1)


async def said(made: Path, more: dict[str, str]) -> str:
    """What a server writes to standard error while strangers knock."""
    command, pipe = python_command("tests.security.programs.grpc_server", str(made)), asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env={**child_environment(more), "LOG_FORMAT": "text"}
    )
    assert process.stdout is not None
    address = (await asyncio.wait_for(process.stdout.readline(), SECONDS)).decode().strip()
    await asyncio.to_thread(knock, address, KNOCKS)
    _, written = await asyncio.wait_for(process.communicate(b""), SECONDS)
    assert process.returncode == 0, written
    return written.decode()


async def test_a_strangers_name_for_the_server_is_not_written_down(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    written = await said(made, {})
    assert "forged" not in written
    assert len(written.splitlines()) < LINES


@pytest.mark.parametrize("verbosity", ["ERROR", "INFO"])
async def test_what_grpc_says_when_asked_is_escaped_and_bounded(made: Path, verbosity: str) -> None:
    written = await said(made, {"GRPC_VERBOSITY": verbosity})
    lines = written.splitlines()
    assert "No match found for server name: A\\x1b[31m" in written
    assert UNPRINTABLE.search(written.replace("\n", "")) is None
    assert [line for line in lines if line.startswith("error: ")] == []
    assert len(lines) < 2 * LINES, "of the filter, and those of the handshakes that led nowhere"
    assert max(map(len, lines)) < 2 * LINE_BYTES
