from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from tests.intake.builders import PLAN, VERSION, accept, bound, chain, complete, grant, make_table, question
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason, LeaseKind
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, TreeError

pytestmark = pytest.mark.pure


def finish(table: LeaseTable, lease: str) -> None:
    accept(table, chain(lease, version=table.open_leases[lease].lease.min_version))
    table.end_lease(complete(lease))


def test_leases_stay_within_the_staleness_bound() -> None:
    table = make_table(batch=2, max_lag=1)
    leases = [grant(table) for _ in range(4)]
    assert table.next_lease() is None
    finish(table, leases[0])
    assert table.next_lease() is None, "a ready group counts as much as one that is out"
    table.train_queue.mark_trained(1)
    assert table.next_lease() is not None


def test_no_more_is_leased_than_the_run_still_needs() -> None:
    table = make_table(batch=2, max_lag=3, total=2)
    for lease in [grant(table), grant(table)]:
        assert table.next_lease() is None
        finish(table, lease)
    assert table.next_lease() is None


def test_nothing_is_leased_before_there_are_weights() -> None:
    table = make_table()
    table.version = None
    assert table.next_lease() is None


def test_groups_that_close_in_order_are_trained_within_max_lag() -> None:
    batch, max_lag = 3, 2
    table = make_table(questions=50, batch=batch, max_lag=max_lag, total=1000)
    out: list[tuple[str, int]] = []
    for version in range(20):
        table.version = PolicyVersion(1, version)
        while (work := table.next_lease()) is not None:
            table.grant_lease(*work, "s", now=0.0)
            out.append((work[0].id, version))
        for lease, granted in [out.pop(0) for _ in range(batch)]:
            finish(table, lease)
            assert version - granted <= max_lag
        table.train_queue.mark_trained(table.train_queue.closed_count)


def overtaken() -> tuple[LeaseTable, str]:
    """A book at policy step 1 whose whole next batch would overtake a group of step 0 that has no later step to go to."""
    table = make_table(batch=1, max_lag=1)
    slow, fast = grant(table), grant(table)
    finish(table, fast)
    table.assign_positions([1], [])
    table.version = PolicyVersion(1, 1)
    table.train_queue.mark_trained(1)
    finish(table, grant(table))
    return table, slow


def test_an_overtaken_group_is_overdue_when_a_whole_batch_waits_for_it() -> None:
    table, slow = overtaken()
    assert [group.lease.id for group in bound(table).overdue_groups()] == [slow]
    finish(table, slow)
    assert bound(table).overdue_groups() == []
    assert [group.draw for group in table.train_queue.ready_groups] == [0, 2], "the older policy goes first"


def test_a_group_closed_early_trains_on_its_leaves_and_is_settled() -> None:
    table, slow = overtaken()
    accept(table, chain(slow))
    assert table.close_group(0).state is GroupState.READY
    assert (bound(table).overdue_groups(), table.count_active_leases(LeaseKind.TRAIN)) == ([], 0)
    with pytest.raises(ContractError, match="reached the staleness bound; its group is closed"):
        accept(table, chain(slow, index=1, parent=1))
    refunded = table.ledger.accounts[LeaseKind.TRAIN].refunded
    end = LeaseEnd(slow, LeaseEndReason.STOPPED, unaccounted=Cost(prefilled=7))
    assert table.end_lease(end).state is GroupState.SETTLED
    rest = PLAN.grant - Budget(28 + 7, 2)
    assert table.ledger.accounts[LeaseKind.TRAIN].refunded - refunded == rest
    assert table.ledger.imbalance(LeaseKind.TRAIN) == Budget()
    assert [group.draw for group in table.train_queue.ready_groups] == [0, 2]


def test_a_group_without_a_leaf_at_the_bound_begins_again() -> None:
    table, slow = overtaken()
    assert table.close_group(0).state is GroupState.REQUEUED
    again = table.next_lease()
    assert again is not None
    assert (again[1], again[0].accepted, again[0].min_version) == (0, (), PolicyVersion(1, 1))
    table.end_lease(complete(slow))
    assert table.open_leases == {}


def test_evaluation_goes_first_greedily_and_outside_the_bound() -> None:
    table = make_table(batch=1, max_lag=0)
    grant(table)
    table.queue_evaluation(VERSION, [question(7)])
    work = table.next_lease()
    assert work is not None
    lease, draw = work
    assert (lease.kind, draw, lease.plan.temperature, lease.plan.leaves) == (LeaseKind.EVAL, -1, 0.0, 1)


def lose(table: LeaseTable, lease: str, reason: LeaseEndReason = LeaseEndReason.LOST) -> RolloutGroup:
    return table.end_lease(LeaseEnd(lease, reason))


def test_a_lost_group_is_leased_again_with_what_it_has_before_anything_new() -> None:
    table = make_table()
    lost, other = grant(table), grant(table)
    accept(table, chain(lost))
    accept(table, chain(lost, index=1, parent=1))
    assert (lose(table, other).state, lose(table, lost).state) == (GroupState.REQUEUED, GroupState.AWAITING_LEASE)
    work = table.next_lease()
    assert work is not None
    lease, draw = work
    assert (draw, lease.question, lease.seed) == (
        0,
        table.unfinished_groups[0].lease.question,
        table.unfinished_groups[0].lease.seed,
    )
    assert lease.id != lost
    assert [(s.tree, s.index) for s in lease.accepted] == [(0, 0), (0, 1)]
    assert lease.grant == PLAN.grant - Budget(2 * 28, 2 * 2)
    table.grant_lease(lease, draw, "s2/1", now=0.0)
    accept(table, chain(lease.id, tree=1))
    table.end_lease(complete(lease.id))
    (group,) = table.train_queue.ready_groups
    assert [(s.lease, s.tree, s.index) for s in group.subtrees] == [(lost, 0, 0), (lost, 0, 1), (lease.id, 1, 0)]
    account = table.ledger.accounts[LeaseKind.TRAIN]
    assert account.spent == Budget(3 * 28, 3 * 2)
    assert account.forfeited == PLAN.grant + PLAN.grant - Budget(2 * 28, 2 * 2)
    assert table.open_leases[grant(table)].draw == 1, "the other one begins again, before a new draw"


def test_a_lost_group_that_has_everything_is_closed() -> None:
    table = make_table()
    lease = grant(table)
    for tree in range(PLAN.trees):
        for index in range(PLAN.branches):
            accept(table, chain(lease, tree, index))
    assert lose(table, lease).state is GroupState.READY
    assert table.train_queue.closed_count == 1


def test_a_lost_group_that_fits_into_no_lease_is_closed_with_what_it_has() -> None:
    table = make_table(max_releasable_tokens=7 + 2 * 4 + 3 - 1)
    lease = grant(table)
    accept(table, chain(lease))
    assert lose(table, lease).state is GroupState.READY


def test_a_group_keeps_the_age_of_its_oldest_lease() -> None:
    table = make_table()
    lease = grant(table)
    accept(table, chain(lease))
    lose(table, lease)
    table.version = PolicyVersion(1, 1)
    again = grant(table)
    assert (table.open_leases[again].min_policy_step, table.open_leases[again].lease.min_version) == (0, PolicyVersion(1, 1))


def test_a_late_subtree_is_accepted_until_another_sampler_goes_on() -> None:
    table = make_table()
    lost = grant(table)
    accept(table, chain(lost))
    lose(table, lost)
    assert accept(table, chain(lost, index=1, parent=1))
    assert not accept(table, chain(lost, index=1, parent=1)), "once"
    account = table.ledger.accounts[LeaseKind.TRAIN]
    assert (account.spent.tokens, account.granted - account.forfeited) == (2 * 28, account.spent)
    again = grant(table)
    with pytest.raises(ContractError, match="is not open; its subtrees are refused"):
        accept(table, chain(lost, index=2, parent=1))
    assert accept(table, chain(again, index=2, parent=1))
    assert table.ledger.imbalance(LeaseKind.TRAIN) == Budget()


@pytest.mark.parametrize("reason", [LeaseEndReason.LOST, LeaseEndReason.FAILED])
@pytest.mark.parametrize("leaves", [0, 1])
def test_a_question_that_fails_on_three_tries_is_given_up(reason: LeaseEndReason, leaves: int) -> None:
    table = make_table(total=1)
    states: list[GroupState] = []
    for number in range(3):
        lease = grant(table)
        if leaves and number == 0:
            accept(table, chain(lease))
        states.append(lose(table, lease, reason).state)
    again = GroupState.AWAITING_LEASE if leaves else GroupState.REQUEUED
    assert states == [again, again, GroupState.READY if leaves else GroupState.SET_ASIDE]
    assert (table.train_queue.closed_count, table.set_aside_counts) == ((1, {}) if leaves else (0, {reason.value: 1}))
    assert (table.next_lease() is None) == bool(leaves), "another question takes the place of one that gave nothing"


@pytest.mark.parametrize("reason", [LeaseEndReason.RETURNED, LeaseEndReason.INTERRUPTED, LeaseEndReason.STOPPED])
def test_what_is_no_fault_of_the_question_does_not_count_against_it(reason: LeaseEndReason) -> None:
    table = make_table()
    for _ in range(5):
        assert lose(table, grant(table), reason).state is GroupState.REQUEUED
        assert table.next_lease() is not None


def test_what_a_returned_lease_did_not_spend_is_refunded() -> None:
    table = make_table()
    lease = grant(table)
    table.end_lease(LeaseEnd(lease, LeaseEndReason.RETURNED, unaccounted=Cost(decoded=5)))
    account = table.ledger.accounts[LeaseKind.TRAIN]
    assert (account.spent.tokens, account.forfeited, account.refunded) == (5, Budget(), PLAN.grant - Budget(5))


def test_an_evaluation_question_is_tried_three_times_and_then_has_failed() -> None:
    table = make_table()
    table.queue_evaluation(VERSION, [question(7)])
    for reason in (LeaseEndReason.LOST, LeaseEndReason.FAILED):
        assert lose(table, grant(table), reason).state is GroupState.REQUEUED
    assert lose(table, grant(table)).state is GroupState.SET_ASIDE
    assert table.evaluation_answers.leaves == {"made/train/7": None}
    assert table.set_aside_counts == {}


def test_a_lost_evaluation_that_has_its_answer_is_closed() -> None:
    table = make_table()
    table.queue_evaluation(VERSION, [question(7)])
    lease = grant(table)
    accept(table, chain(lease))
    assert lose(table, lease).state is GroupState.READY
    assert table.evaluation_answers.leaves["made/train/7"] is not None


def test_groups_older_than_the_bound_are_left_out_and_counted() -> None:
    """Which takes a lower max_lag or batch after a restart."""
    table = make_table(batch=1, max_lag=0)
    finish(table, grant(table))
    table.version = PolicyVersion(1, 3)
    assert bound(table).stale_draws() == [0]
    (group,) = table.assign_positions([], [0])
    assert (group.state, table.set_aside_counts, table.train_queue.closed_count) == (GroupState.SET_ASIDE, {"stale": 1}, 0)


def test_work_of_an_older_policy_than_the_lease_asks_for_is_refused() -> None:
    """As it comes when the trainer went back to a checkpoint, and its samplers with it."""
    table = make_table(batch=1, max_lag=1)
    table.version = PolicyVersion(1, 2)
    lease = grant(table)
    with pytest.raises(TreeError, match=r"has tokens of policy step 0; its lease asks for 2 or later") as refusal:
        accept(table, chain(lease, version=PolicyVersion(2, 0)))
    assert refusal.value.field == "age"


def test_a_subtree_that_comes_twice_is_counted_once() -> None:
    table = make_table()
    lease = grant(table)
    assert accept(table, chain(lease))
    spent = table.ledger.accounts[LeaseKind.TRAIN].spent
    assert not accept(table, chain(lease))
    assert table.ledger.accounts[LeaseKind.TRAIN].spent == spent == Budget(tokens=28, tool_calls=2)


def test_work_nobody_asked_for_is_refused_and_changes_nothing() -> None:
    table = make_table()
    lease = grant(table)
    for foreign_subtree in (chain("train-9999999"), chain(lease, tree=PLAN.trees), chain(lease, index=1, parent=99)):
        with pytest.raises(ContractError):
            accept(table, foreign_subtree)
    assert table.ledger.accounts[LeaseKind.TRAIN].spent == Budget()


def test_a_failed_branch_leaves_the_rest_of_its_group() -> None:
    table = make_table()
    lease = grant(table)
    accept(table, chain(lease, tree=0))
    accept(table, chain(lease, tree=1, fails=True))
    table.end_lease(complete(lease))
    (group,) = table.train_queue.ready_groups
    assert [leaf.reward for _, leaf in group.group.leaves()] == [1.0], "an error is no reward of zero"


def test_a_group_without_a_leaf_is_closed_but_never_trained() -> None:
    table = make_table()
    lease = grant(table)
    accept(table, chain(lease, fails=True))
    table.end_lease(LeaseEnd(lease, LeaseEndReason.FAILED))
    assert table.train_queue.closed_count == 0
    assert table.next_lease() is not None


EVENTS = ["grant", "accept", "complete", "lose", "train", "evaluate"]


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 9)), max_size=60))
def test_the_ledger_balances_whatever_happens(events: list[tuple[str, int]]) -> None:
    table = make_table(batch=3)
    for event, pick in events:
        leases = sorted(table.open_leases)
        match event:
            case "grant" if table.version and (work := table.next_lease()):
                table.grant_lease(*work, f"s{pick}", now=0.0)
            case "accept" if leases:
                accept(table, chain(leases[pick % len(leases)], tree=0, index=0))
            case "complete" if leases:
                table.end_lease(complete(leases[pick % len(leases)]))
            case "lose" if leases:
                table.end_lease(LeaseEnd(leases[pick % len(leases)], LeaseEndReason.LOST))
            case "train":
                table.train_queue.mark_trained(table.train_queue.closed_count)
            case "evaluate":
                table.queue_evaluation(VERSION, [question(pick)])
            case _:
                pass
        for kind in LeaseKind:
            assert table.ledger.imbalance(kind) == Budget()
            assert table.ledger.outstanding(kind).tokens >= 0
        assert table.count_active_leases(LeaseKind.TRAIN) + table.train_queue.untrained_count <= 2 * 3


def test_spending_beyond_the_grant_is_granted_on_top() -> None:
    table = make_table()
    lease = grant(table)
    table.ledger.record_spend(lease, PLAN.grant + Budget(tokens=5))
    table.ledger.refund_lease(lease)
    account = table.ledger.accounts[LeaseKind.TRAIN]
    assert account.refunded == Budget()
    assert account.granted == PLAN.grant + Budget(tokens=5)


def test_versions_are_written_and_read_back() -> None:
    assert PolicyVersion.parse(str(VERSION)) == VERSION
    with pytest.raises(ContractError, match=r"LINEAGE\.STEP"):
        PolicyVersion.parse("seven")
