from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.intake.leases import LeaseBook
from tests.intake.builders import PLAN, VERSION, book, chain, complete, grant, question
from treegrpo.budget import Budget
from treegrpo.errors import ContractError
from treegrpo.lease import LeaseEnd, LeaseEndReason, LeaseKind
from treegrpo.tree import PolicyVersion


def finish(made: LeaseBook, lease: str) -> None:
    made.accept(chain(lease))
    made.ended(complete(lease))


def test_leases_stay_within_the_staleness_bound() -> None:
    made = book(batch=2, max_lag=1)
    leases = [grant(made) for _ in range(4)]
    assert made.next_lease() is None
    finish(made, leases[0])
    assert made.next_lease() is None, "a ready group counts as much as one that is out"
    made.groups.trained(1)
    assert made.next_lease() is not None


def test_no_more_is_leased_than_the_run_still_needs() -> None:
    made = book(batch=2, max_lag=3, total=2)
    for lease in [grant(made), grant(made)]:
        assert made.next_lease() is None
        finish(made, lease)
    assert made.next_lease() is None


def test_nothing_is_leased_before_there_are_weights() -> None:
    made = book()
    made.version = None
    assert made.next_lease() is None


def test_a_group_is_trained_at_most_max_lag_versions_late_when_groups_close_in_order() -> None:
    batch, max_lag = 3, 2
    made = book(questions=50, batch=batch, max_lag=max_lag, total=1000)
    out: list[tuple[str, int]] = []
    for version in range(20):
        made.version = PolicyVersion(1, version)
        while (work := made.next_lease()) is not None:
            made.granted(*work, "s", now=0.0)
            out.append((work[0].id, version))
        for lease, granted in [out.pop(0) for _ in range(batch)]:
            finish(made, lease)
            assert version - granted <= max_lag
        made.groups.trained(made.groups.end)


def test_a_group_that_others_overtake_is_told_to_stop_once_and_in_time() -> None:
    made = book(batch=2, max_lag=0)
    slow, fast = grant(made), grant(made)
    assert [g.lease.id for g in made.overdue()] == []
    finish(made, fast)
    made.version = PolicyVersion(1, 1)
    made.groups.trained(1)
    assert [g.lease.id for g in made.overdue()] == [slow]
    assert list(made.overdue()) == []


def test_evaluation_goes_first_greedily_and_outside_the_bound() -> None:
    made = book(batch=1, max_lag=0)
    grant(made)
    made.evaluate([question(7)])
    work = made.next_lease()
    assert work is not None
    lease, draw = work
    assert (lease.kind, draw, lease.plan.temperature, lease.plan.leaves) == (LeaseKind.EVAL, -1, 0.0, 1)


def test_a_lost_lease_returns_its_question_and_comes_next() -> None:
    made = book()
    lost = grant(made)
    asked = made.open[lost].lease.question
    grant(made)
    made.accept(chain(lost))
    made.ended(LeaseEnd(lost, LeaseEndReason.LOST))
    again = made.next_lease()
    assert again is not None
    assert again[0].question == asked
    assert again[0].id != lost
    assert made.ledger.accounts[LeaseKind.TRAIN].forfeited.tokens > 0


def test_a_subtree_that_comes_twice_is_counted_once() -> None:
    made = book()
    lease = grant(made)
    assert made.accept(chain(lease))
    spent = made.ledger.accounts[LeaseKind.TRAIN].spent
    assert not made.accept(chain(lease))
    assert made.ledger.accounts[LeaseKind.TRAIN].spent == spent == Budget(tokens=28, tool_calls=2)


def test_work_nobody_asked_for_is_refused_and_changes_nothing() -> None:
    made = book()
    lease = grant(made)
    for stranger in (chain("train-9999999"), chain(lease, tree=PLAN.trees), chain(lease, index=1, parent=99)):
        with pytest.raises(ContractError):
            made.accept(stranger)
    assert made.ledger.accounts[LeaseKind.TRAIN].spent == Budget()


def test_a_failed_branch_leaves_the_rest_of_its_group() -> None:
    made = book()
    lease = grant(made)
    made.accept(chain(lease, tree=0))
    made.accept(chain(lease, tree=1, fails=True))
    made.ended(complete(lease))
    (group,) = made.groups.take(0, 1)
    assert [leaf.reward for _, leaf in group.group.leaves()] == [1.0], "an error is no reward of zero"


def test_a_group_without_a_leaf_is_closed_but_never_trained() -> None:
    made = book()
    lease = grant(made)
    made.accept(chain(lease, fails=True))
    made.ended(LeaseEnd(lease, LeaseEndReason.FAILED))
    assert made.groups.end == 0


EVENTS = ["grant", "accept", "complete", "lose", "train", "evaluate"]


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 9)), max_size=60))
def test_the_ledger_balances_whatever_happens(events: list[tuple[str, int]]) -> None:
    made = book(batch=3)
    for event, pick in events:
        leases = sorted(made.open)
        match event:
            case "grant" if made.version and (work := made.next_lease()):
                made.granted(*work, f"s{pick}", now=0.0)
            case "accept" if leases:
                made.accept(chain(leases[pick % len(leases)], tree=0, index=0))
            case "complete" if leases:
                made.ended(complete(leases[pick % len(leases)]))
            case "lose" if leases:
                made.ended(LeaseEnd(leases[pick % len(leases)], LeaseEndReason.LOST))
            case "train":
                made.groups.trained(made.groups.end)
            case "evaluate":
                made.evaluate([question(pick)])
            case _:
                pass
        for kind in LeaseKind:
            assert made.ledger.imbalance(kind) == Budget()
            assert made.ledger.outstanding(kind).tokens >= 0
        assert made.out(LeaseKind.TRAIN) + made.groups.waiting <= 2 * 3


def test_spending_beyond_the_grant_is_granted_on_top() -> None:
    made = book()
    lease = grant(made)
    made.ledger.spend(lease, PLAN.grant + Budget(tokens=5))
    made.ledger.refund(lease)
    account = made.ledger.accounts[LeaseKind.TRAIN]
    assert account.refunded == Budget()
    assert account.granted == PLAN.grant + Budget(tokens=5)


def test_versions_are_written_and_read_back() -> None:
    assert PolicyVersion.parse(str(VERSION)) == VERSION
    with pytest.raises(ContractError, match=r"LINEAGE\.STEP"):
        PolicyVersion.parse("seven")
