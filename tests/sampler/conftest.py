"""A run directory and a broker for a real intake."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.control.broker_processes import embedded
from tests.intake.process_harness import IntakeProcess
from tests.ports import free_address


@pytest.fixture
async def intake(tmp_path: Path) -> AsyncGenerator[IntakeProcess]:
    broker = embedded(free_address())
    await broker.start()
    try:
        yield IntakeProcess(tmp_path, broker.address)
    finally:
        await broker.stop()
