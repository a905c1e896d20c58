"""The state of a rollout group: every legal move is possible, every other one raises."""

from __future__ import annotations

from itertools import product

import pytest

from learner.intake.leases.rollout_group import LEGAL_MOVES, GroupState, RolloutGroup
from tests.intake.builders import accept, chain, complete, grant, make_table
from treegrpo.errors import ContractError

pytestmark = pytest.mark.pure


def group_in(state: GroupState) -> RolloutGroup:
    table = make_table()
    group = table.open_leases[grant(table)]
    group.state = state
    return group


@pytest.mark.parametrize(("before", "after"), list(product(GroupState, GroupState)))
def test_only_legal_moves_are_made(before: GroupState, after: GroupState) -> None:
    group = group_in(before)
    if after in LEGAL_MOVES[before]:
        group.move_to(after)
        assert group.state is after
    else:
        with pytest.raises(ContractError, match=f"^Group 0000000 is {before.value}; it cannot become {after.value}"):
            group.move_to(after)
        assert group.state is before


def test_every_state_can_be_reached() -> None:
    reachable, frontier = set[GroupState](), [GroupState.LEASED, GroupState.SETTLING]
    while frontier:
        state = frontier.pop()
        reachable.add(state)
        frontier += LEGAL_MOVES[state] - reachable
    assert reachable == set(GroupState)


def test_a_group_that_was_closed_is_not_closed_again() -> None:
    table = make_table()
    lease = grant(table)
    accept(table, chain(lease))
    group = table.end_lease(complete(lease))
    with pytest.raises(ContractError, match="is ready; it cannot become ready"):
        table.train_queue.add_ready(group)
