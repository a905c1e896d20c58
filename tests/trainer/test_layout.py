from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from learner.trainer.packing.layout import Layout, PathIds, lay_out, shared_prefix

pytestmark = pytest.mark.pure

some_paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=10)
"""Of three tokens, so that they share beginnings of any length, are beginnings of each other, and come twice."""


def laid_out(paths: Sequence[Sequence[int]]) -> tuple[list[PathIds], Layout, list[NDArray[np.int64]]]:
    made = [np.array(path, np.uint32) for path in sorted(map(list, paths))]
    prefixes = [0, *(shared_prefix(a, b) for a, b in pairwise(made))]
    return made, *lay_out(made, prefixes)


def seen_from_paths(tokens: int, places: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """seen_TT[i, j]: some path has j at or before i."""
    seen_TT = np.zeros((tokens, tokens), bool)
    for place in places:
        seen_TT[np.ix_(place, place)] |= np.tri(len(place), dtype=bool)
    return seen_TT


@settings(max_examples=200, deadline=None)
@given(some_paths)
def test_each_distinct_prefix_is_one_token_at_its_depth(paths: list[list[int]]) -> None:
    made, layout, places = laid_out(paths)
    ids_T = np.full(layout.tokens, -1)
    for path, place in zip(made, places, strict=True):
        ids_T[place] = path
        assert layout.position_T[place].tolist() == list(range(len(path)))
    assert all(ids_T[place].tolist() == path.tolist() for path, place in zip(made, places, strict=True))
    assert layout.tokens == len({tuple(path[: n + 1]) for path in paths for n in range(len(path))})


@settings(max_examples=200, deadline=None)
@given(some_paths)
def test_runs_crosses_and_ends_all_say_what_the_paths_say(paths: list[list[int]]) -> None:
    _, layout, places = laid_out(paths)
    wanted_TT = seen_from_paths(layout.tokens, places)
    blocks_TT = np.zeros_like(wanted_TT, dtype=int)
    for a, b in layout.runs:
        blocks_TT[a:b, a:b] += np.tri(b - a, dtype=int)
    for (a, b), (c, d) in layout.crosses:
        blocks_TT[a:b, c:d] += 1
    assert (blocks_TT == wanted_TT).all()  # every pair once: a second time would count a key twice
    at = np.arange(layout.tokens)
    assert ((at <= at[:, None]) & (at[:, None] < layout.end_T)).tolist() == wanted_TT.tolist()
    assert layout.pairs == wanted_TT.sum()


def test_the_example_of_the_module() -> None:
    _, layout, _ = laid_out([[1, 2, 3, 4], [1, 2, 5, 6], [1, 7]])
    assert layout.runs == ((0, 4), (4, 6), (6, 7))
    assert set(layout.crosses) == {((4, 6), (0, 2)), ((6, 7), (0, 1))}
    assert layout.end_T.tolist() == [7, 6, 4, 4, 6, 6, 7]


def test_branches_off_the_same_place_meet_its_keys_in_one_cross() -> None:
    _, layout, _ = laid_out([[1, 2, 3], [1, 2, 4], [1, 2, 5, 6], [1, 2, 5, 7]])
    assert set(layout.crosses) == {((3, 7), (0, 2)), ((6, 7), (4, 5))}


def test_a_duplicate_path_adds_nothing_and_a_longer_one_extends_its_run() -> None:
    _, layout, places = laid_out([[1, 2], [1, 2], [1, 2, 3]])
    assert (layout.runs, layout.tokens) == (((0, 3),), 3)
    assert [place.tolist() for place in places] == [[0, 1], [0, 1], [0, 1, 2]]


def test_ids_of_the_upper_half_are_told_apart() -> None:
    assert shared_prefix(np.array([1, 2**31 + 1], np.uint32), np.array([1, 2**31], np.uint32)) == 1
    assert shared_prefix(np.zeros(0, np.uint32), np.array([1], np.uint32)) == 0
