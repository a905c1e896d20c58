from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trainer.rank_pair_harness import RankPair


@pytest.fixture(scope="session")
def pair() -> Iterator[RankPair]:
    """Two ranks of a trainer. Starting them takes seconds, so the files that use them are one group of pytest-xdist."""
    with RankPair() as both:
        yield both
