from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.trainer.rank_pair_harness import RankPair


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread for the time of the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair() -> Iterator[RankPair]:
    """Two ranks of a trainer. Starting them takes seconds, so the files that use them are one group of pytest-xdist."""
    with RankPair() as both:
        yield both
