"""The conformance suite, unchanged, on real SGLang servers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.sampler.engines.base import Engine
from tests.engines.conformance import *  # noqa: F403  # the suite's tests run in this module
from tests.engines.conformance import EngineFactory
from tests.sglang.server_harness import ServerPool, remote


@pytest.fixture
def open_engine(pool: ServerPool) -> EngineFactory:
    @asynccontextmanager
    async def open_(path: Path) -> AsyncGenerator[Engine]:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
        async with remote(path, pool.url(kind)) as engine:
            yield engine

    return open_
