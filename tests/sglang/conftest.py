"""Tests on real SGLang servers: `make test-sglang` runs them; elsewhere they are left out, for want of an SGLang."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests.sglang.servers import Pool

pytest.register_assert_rewrite("tests.engines.conformance")
if "SGLANG_PYTHON" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("sglang"))
    yield pool
    pool.close()
