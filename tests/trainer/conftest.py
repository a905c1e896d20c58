from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trainer.pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two ranks of a trainer. Starting them takes seconds, so the files that use them are one group of pytest-xdist."""
    with Pair() as both:
        yield both
