"""Every test of this folder runs on both brokers; without a mosquitto binary one half is skipped, or fails where CI asks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.control import broker_processes
from tests.control.broker_processes import Broker


def _made(kind: str, folder: Path) -> Broker:
    if kind == "embedded":
        return broker_processes.embedded(broker_processes.free_address())
    if (binary := broker_processes.mosquitto_binary()) is not None:
        return broker_processes.mosquitto(binary, folder)
    if os.environ.get("REQUIRE_MOSQUITTO"):
        pytest.fail("REQUIRE_MOSQUITTO is set, but there is no mosquitto binary on the PATH")
    pytest.skip("no mosquitto binary on the PATH; .ci/run installs one")


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Broker]:
    """A running broker; tests share it, so each uses a run name of its own."""
    made = _made(request.param, tmp_path_factory.mktemp("broker"))
    asyncio.run(made.start())
    try:
        yield made
    finally:
        asyncio.run(made.stop())


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """The test's run name."""
    return "".join(character if character.isalnum() else "-" for character in request.node.name)
