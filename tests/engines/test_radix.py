from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sampler.engines.embedded.radix import RadixTree, common_prefix
from treegrpo.core.step import TokenIds

pytestmark = pytest.mark.pure

Sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30)


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, np.uint32)


def prefixes(sequence: list[int]) -> list[tuple[int, ...]]:
    return [tuple(sequence[: n + 1]) for n in range(len(sequence))]


@given(Sequences)
def test_with_room_for_all_it_equals_a_map_of_every_prefix(sequences: list[list[int]]) -> None:
    tree = RadixTree(1000)
    stored: dict[tuple[int, ...], int] = {}
    for sequence in sequences:
        found = tree.match(ids(*sequence)).tolist()
        assert found == [stored[p] for p in prefixes(sequence) if p in stored]
        start, slots = tree.insert(ids(*sequence))
        assert start == len(found)
        stored.update(zip(prefixes(sequence)[start:], slots.tolist(), strict=True))
        assert tree.used == len(stored) == len(set(stored.values()))
        assert tree.match(ids(*sequence)).tolist() == [stored[p] for p in prefixes(sequence)]
    assert tree.evicted == 0


@given(Sequences, st.integers(0, 20))
def test_under_eviction_every_answer_is_the_latest_slot_of_that_prefix(sequences: list[list[int]], capacity: int) -> None:
    tree = RadixTree(capacity)
    written: dict[int, tuple[int, ...]] = {}
    for sequence in sequences:
        start, slots = tree.insert(ids(*sequence))
        # What a caller writes into the slots it is given; a slot handed out twice loses the older prefix.
        written.update(zip(slots.tolist(), prefixes(sequence)[start:], strict=False))
        for asked in sequences:
            assert [written[slot] for slot in tree.match(ids(*asked)).tolist()] == prefixes(asked)[: len(tree.match(ids(*asked)))]
        assert len(tree.match(ids(*sequence))) == min(len(sequence), capacity)
        assert 0 <= tree.used <= capacity


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = RadixTree(6)
    tree.insert(ids(1, 1, 1))
    tree.insert(ids(2, 2, 2))
    tree.match(ids(1, 1, 1))
    tree.insert(ids(3, 3))
    assert [len(tree.match(ids(n, n, n))) for n in (1, 2)] == [3, 0]
    assert tree.evicted == 3


def test_a_shared_prefix_outlives_its_evicted_branches() -> None:
    tree = RadixTree(6)
    tree.insert(ids(1, 1, 2, 2))
    tree.insert(ids(1, 1, 3, 3))
    tree.insert(ids(4, 4))
    assert [len(tree.match(ids(1, 1, n, n))) for n in (2, 3)] == [2, 4]


def test_common_prefix() -> None:
    assert common_prefix(ids(1, 2, 3), ids(1, 2, 4, 5)) == 2
    assert common_prefix(ids(1, 2), ids(1, 2, 3)) == 2
    assert common_prefix(ids(), ids(1)) == 0
