"""A broker for all tests of this folder, and a run directory for each test."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.control.broker_processes import Broker, embedded
from tests.intake.process_harness import IntakeProcess
from tests.ports import free_address


@pytest.fixture(scope="session")
def broker() -> Generator[Broker]:
    """A running broker; tests share it, so each has a run name of its own."""
    made = embedded(free_address())
    asyncio.run(made.start())
    yield made
    asyncio.run(made.stop())


@pytest.fixture
def intake(tmp_path: Path, broker: Broker) -> IntakeProcess:
    return IntakeProcess(tmp_path, broker.address)
