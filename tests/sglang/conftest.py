"""Tests on real SGLang servers: `make test-sglang` runs them; elsewhere they are left out, for want of an SGLang."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.engines import builders
from tests.sglang.server_harness import ServerPool

pytest.register_assert_rewrite("tests.engines.conformance", "tests.sglang.sampling_harness")
if "SGLANG_PYTHON" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServerPool]:
    pool = ServerPool(tmp_path_factory.mktemp("sglang"))
    yield pool
    pool.stop_servers()


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return builders.save_endless(tmp_path_factory.mktemp("endless"))
