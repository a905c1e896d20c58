from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.intake.leases import rollout_group
from learner.intake.leases.lease_table import LeaseBook
from learner.intake.leases.rollout_group import Fate, OpenGroup
from tests.intake.builders import PLAN, VERSION, book, chain, complete, grant, question
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason, LeaseKind
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, TreeError


def finish(made: LeaseBook, lease: str) -> None:
    made.accept(chain(lease, version=made.open[lease].lease.min_version))
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
        made.groups.trained(made.groups.closed)


def overtaken() -> tuple[LeaseBook, str]:
    """A book at policy step 1 whose whole next batch would overtake a group of step 0 that has no later step to go to."""
    made = book(batch=1, max_lag=1)
    slow, fast = grant(made), grant(made)
    finish(made, fast)
    made.taken([1], [])
    made.version = PolicyVersion(1, 1)
    made.groups.trained(1)
    finish(made, grant(made))
    return made, slow


def test_a_group_that_others_overtake_is_pressing_when_a_whole_batch_waits_for_it() -> None:
    made, slow = overtaken()
    assert [group.lease.id for group in made.overdue()] == [slow]
    finish(made, slow)
    assert made.overdue() == []
    assert [group.draw for group in made.groups.ready] == [0, 2], "the older policy goes first"


def test_a_group_closed_early_trains_on_its_leaves_and_its_lease_is_still_settled() -> None:
    made, slow = overtaken()
    made.accept(chain(slow))
    assert made.close(0).fate is Fate.CLOSED
    assert (made.overdue(), made.out(LeaseKind.TRAIN)) == ([], 0)
    with pytest.raises(ContractError, match="reached the staleness bound; its group is closed"):
        made.accept(chain(slow, index=1, parent=1))
    refunded = made.ledger.accounts[LeaseKind.TRAIN].refunded
    end = LeaseEnd(slow, LeaseEndReason.STOPPED, unaccounted=Cost(prefilled=7))
    assert made.ended(end).closed
    rest = PLAN.grant - Budget(28 + 7, 2)
    assert made.ledger.accounts[LeaseKind.TRAIN].refunded - refunded == rest
    assert made.ledger.imbalance(LeaseKind.TRAIN) == Budget()
    assert [group.draw for group in made.groups.ready] == [0, 2]


def test_a_group_without_a_leaf_at_the_bound_begins_again() -> None:
    made, slow = overtaken()
    assert made.close(0).fate is Fate.WAITING
    again = made.next_lease()
    assert again is not None
    assert (again[1], again[0].accepted, again[0].min_version) == (0, (), PolicyVersion(1, 1))
    made.ended(complete(slow))
    assert made.open == {}


def test_evaluation_goes_first_greedily_and_outside_the_bound() -> None:
    made = book(batch=1, max_lag=0)
    grant(made)
    made.evaluate(VERSION, [question(7)])
    work = made.next_lease()
    assert work is not None
    lease, draw = work
    assert (lease.kind, draw, lease.plan.temperature, lease.plan.leaves) == (LeaseKind.EVAL, -1, 0.0, 1)


def lose(made: LeaseBook, lease: str, reason: LeaseEndReason = LeaseEndReason.LOST) -> OpenGroup:
    return made.ended(LeaseEnd(lease, reason))


def test_a_lost_group_is_leased_again_with_what_it_has_before_anything_new() -> None:
    made = book()
    lost, other = grant(made), grant(made)
    made.accept(chain(lost))
    made.accept(chain(lost, index=1, parent=1))
    assert lose(made, other).fate is lose(made, lost).fate is Fate.WAITING
    work = made.next_lease()
    assert work is not None
    lease, draw = work
    assert (draw, lease.question, lease.seed) == (0, made.unfinished[0].lease.question, made.unfinished[0].lease.seed)
    assert lease.id != lost
    assert [(s.tree, s.index) for s in lease.accepted] == [(0, 0), (0, 1)]
    assert lease.grant == PLAN.grant - Budget(2 * 28, 2 * 2)
    made.granted(lease, draw, "s2/1", now=0.0)
    made.accept(chain(lease.id, tree=1))
    made.ended(complete(lease.id))
    (group,) = made.groups.ready
    assert [(s.lease, s.tree, s.index) for s in group.subtrees] == [(lost, 0, 0), (lost, 0, 1), (lease.id, 1, 0)]
    account = made.ledger.accounts[LeaseKind.TRAIN]
    assert account.spent == Budget(3 * 28, 3 * 2)
    assert account.forfeited == PLAN.grant + PLAN.grant - Budget(2 * 28, 2 * 2)
    assert made.open[grant(made)].draw == 1, "the other one begins again, before a new draw"


def test_a_lost_group_that_has_everything_is_closed() -> None:
    made = book()
    lease = grant(made)
    for tree in range(PLAN.trees):
        for index in range(PLAN.branches):
            made.accept(chain(lease, tree, index))
    assert lose(made, lease).fate is Fate.CLOSED
    assert made.groups.closed == 1


def test_a_lost_group_that_would_not_fit_into_a_lease_is_closed_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_group, "MOVABLE_TOKENS", 7 + 2 * 4 + 3 - 1)
    made = book()
    lease = grant(made)
    made.accept(chain(lease))
    assert lose(made, lease).fate is Fate.CLOSED


def test_a_group_keeps_the_age_of_its_oldest_lease() -> None:
    made = book()
    lease = grant(made)
    made.accept(chain(lease))
    lose(made, lease)
    made.version = PolicyVersion(1, 1)
    again = grant(made)
    assert (made.open[again].age, made.open[again].lease.min_version) == (0, PolicyVersion(1, 1))


def test_a_late_subtree_is_accepted_until_another_sampler_goes_on() -> None:
    made = book()
    lost = grant(made)
    made.accept(chain(lost))
    lose(made, lost)
    assert made.accept(chain(lost, index=1, parent=1))
    assert not made.accept(chain(lost, index=1, parent=1)), "once"
    account = made.ledger.accounts[LeaseKind.TRAIN]
    assert (account.spent.tokens, account.granted - account.forfeited) == (2 * 28, account.spent)
    again = grant(made)
    with pytest.raises(ContractError, match="is not open; its work is no longer wanted"):
        made.accept(chain(lost, index=2, parent=1))
    assert made.accept(chain(again, index=2, parent=1))
    assert made.ledger.imbalance(LeaseKind.TRAIN) == Budget()


@pytest.mark.parametrize("reason", [LeaseEndReason.LOST, LeaseEndReason.FAILED])
@pytest.mark.parametrize("leaves", [0, 1])
def test_a_question_that_fails_on_three_tries_is_given_up(reason: LeaseEndReason, leaves: int) -> None:
    made = book(total=1)
    fates: list[Fate] = []
    for number in range(3):
        lease = grant(made)
        if leaves and number == 0:
            made.accept(chain(lease))
        fates.append(lose(made, lease, reason).fate)
    assert fates == [Fate.WAITING, Fate.WAITING, Fate.CLOSED if leaves else Fate.ASIDE]
    assert (made.groups.closed, made.set_aside) == ((1, {}) if leaves else (0, {reason.value: 1}))
    assert (made.next_lease() is None) == bool(leaves), "another question takes the place of one that gave nothing"


@pytest.mark.parametrize("reason", [LeaseEndReason.RETURNED, LeaseEndReason.INTERRUPTED, LeaseEndReason.STOPPED])
def test_what_is_no_fault_of_the_question_does_not_count_against_it(reason: LeaseEndReason) -> None:
    made = book()
    for _ in range(5):
        assert lose(made, grant(made), reason).fate is Fate.WAITING
        assert made.next_lease() is not None


def test_what_a_returned_lease_did_not_spend_is_refunded() -> None:
    made = book()
    lease = grant(made)
    made.ended(LeaseEnd(lease, LeaseEndReason.RETURNED, unaccounted=Cost(decoded=5)))
    account = made.ledger.accounts[LeaseKind.TRAIN]
    assert (account.spent.tokens, account.forfeited, account.refunded) == (5, Budget(), PLAN.grant - Budget(5))


def test_an_evaluation_question_is_tried_three_times_and_then_has_failed() -> None:
    made = book()
    made.evaluate(VERSION, [question(7)])
    for reason in (LeaseEndReason.LOST, LeaseEndReason.FAILED):
        assert lose(made, grant(made), reason).fate is Fate.WAITING
    assert lose(made, grant(made)).fate is Fate.ASIDE
    assert made.answers.leaves == {"made/train/7": None}
    assert made.set_aside == {}


def test_a_lost_evaluation_that_has_its_answer_is_closed() -> None:
    made = book()
    made.evaluate(VERSION, [question(7)])
    lease = grant(made)
    made.accept(chain(lease))
    assert lose(made, lease).fate is Fate.CLOSED
    assert made.answers.leaves["made/train/7"] is not None


def test_groups_older_than_the_bound_are_left_out_and_counted() -> None:
    """Which takes a lower max_lag or batch after a restart."""
    made = book(batch=1, max_lag=0)
    finish(made, grant(made))
    made.version = PolicyVersion(1, 3)
    assert made.stale() == [0]
    (group,) = made.taken([], [0])
    assert (group.fate, made.set_aside, made.groups.closed) == (Fate.ASIDE, {"stale": 1}, 0)


def test_work_of_an_older_policy_than_the_lease_asks_for_is_refused() -> None:
    """As it comes when the trainer went back to a checkpoint, and its samplers with it."""
    made = book(batch=1, max_lag=1)
    made.version = PolicyVersion(1, 2)
    lease = grant(made)
    with pytest.raises(TreeError, match=r"has tokens of policy step 0; its lease asks for 2 or later") as refusal:
        made.accept(chain(lease, version=PolicyVersion(2, 0)))
    assert refusal.value.field == "age"


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
    (group,) = made.groups.ready
    assert [leaf.reward for _, leaf in group.group.leaves()] == [1.0], "an error is no reward of zero"


def test_a_group_without_a_leaf_is_closed_but_never_trained() -> None:
    made = book()
    lease = grant(made)
    made.accept(chain(lease, fails=True))
    made.ended(LeaseEnd(lease, LeaseEndReason.FAILED))
    assert made.groups.closed == 0
    assert made.next_lease() is not None


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
                made.groups.trained(made.groups.closed)
            case "evaluate":
                made.evaluate(VERSION, [question(pick)])
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
