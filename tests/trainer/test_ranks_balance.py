from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.trainer.distributed.ranks import balance_costs

pytestmark = pytest.mark.pure


@given(st.lists(st.floats(0, 1e6), max_size=30), st.integers(1, 5), st.randoms())
def test_packs_are_dealt_out_once_each_in_the_fewest_and_shortest_rounds(costs: list[float], world: int, random: Any) -> None:
    def seconds(shares: list[list[int]]) -> float:
        rounds = max(map(len, shares))
        return sum(max(costs[share[n]] if n < len(share) else 0.0 for share in shares) for n in range(rounds))

    shares = balance_costs(costs, world)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert max(map(len, shares)) == -(-len(costs) // world)
    order = list(range(len(costs)))
    random.shuffle(order)
    assert seconds(shares) <= seconds([order[rank::world] for rank in range(world)]) * (1 + 1e-9)


def test_loads_are_even_where_packs_allow_it() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(size=40).tolist()
    loads = [sum(costs[index] for index in share) for share in balance_costs(costs, 4)]
    assert max(loads) < 1.1 * sum(costs) / 4
    assert balance_costs([1, 9, 5, 8, 5], 2) == [[1, 4], [3, 2, 0]]
