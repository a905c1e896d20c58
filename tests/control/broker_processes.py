"""Broker processes: the embedded broker and Mosquitto; they can be stopped and restarted at the same address."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from services.cli.processes.readiness import probe_broker, wait_until_ready
from tests.ports import free_address

READY_SECONDS = 30.0


def mosquitto_binary() -> str | None:
    return shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")


class Broker:
    """A broker process at ``address``."""

    def __init__(self, address: str, command: Sequence[str]) -> None:
        self.address = address
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdin=quiet, stdout=quiet, stderr=quiet)  # noqa: ASYNC220
        await wait_until_ready("broker", lambda: probe_broker(self.address), READY_SECONDS)

    async def stop(self) -> None:
        """End it at once, like a crash."""
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None


def embedded(address: str) -> Broker:
    """The broker of `treegrpo up`."""
    return Broker(address, [sys.executable, "-m", "services.broker.server", "--broker.address", address])


def mosquitto(binary: str, folder: Path) -> Broker:
    address = free_address()
    host, _, port = address.rpartition(":")
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} {host}\nallow_anonymous true\n", encoding="utf-8")
    return Broker(address, [binary, "-c", str(config)])
