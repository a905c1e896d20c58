"""One bad sampler costs itself alone: it is put aside, others go on, and no question is blamed for it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from learner.intake.leases.circuit_breaker import (
    FAILURES,
    OPENINGS,
    BreakerLimits,
    LeaseOutcome,
    NoProgressBreaker,
)
from learner.intake.leases.question_give_up import MAX_ATTEMPTS, QuestionAttempts
from learner.intake.leases.rollout_group import RolloutGroup
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence import lease_events
from tests.intake.builders import accept, chain, grant, make_table
from tests.intake.process_harness import SamplerPeer
from tests.intake.server_harness import serve_intake
from tests.manual_clock import ManualClock
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.codec import lease_end_to_pb

LIMITS = BreakerLimits()
FIRST_SECONDS, *_, MAX_SECONDS = LIMITS.open_backoff.delays
LONG_OPEN = BreakerLimits(Backoff((30.0,)))


def manual_clock() -> ManualClock:
    return ManualClock(100.0)


def fail(breaker: NoProgressBreaker, name: str, leases: int = FAILURES, outcome: LeaseOutcome = LeaseOutcome.FAILED) -> float:
    """So many leases in a row; for how long the sampler is then put aside."""
    return max(breaker.record_outcome(name, outcome, f"{name} is broken") for _ in range(leases))


def fail_for_good(breaker: NoProgressBreaker, clock: ManualClock, name: str) -> None:
    for _ in range(OPENINGS):
        clock.now += fail(breaker, name)


# ---- putting a sampler aside


def test_a_sampler_that_only_fails_is_put_aside_for_longer_each_time() -> None:
    clock, asked = manual_clock(), list[float]()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    breaker.sampler_joined("s1")
    assert fail(breaker, "s1", FAILURES - 1) == 0.0
    assert breaker.lease_quota("s1") is None
    for _ in range(8):
        seconds = fail(breaker, "s1")
        asked.append(seconds)
        assert (breaker.lease_quota("s1"), breaker.count_put_aside()) == (0, 1)
        clock.now += seconds
        assert breaker.lease_quota("s1") == FAILURES, "a trial"
    assert asked == [FIRST_SECONDS, 2.0, 4.0, 8.0, 16.0, MAX_SECONDS, MAX_SECONDS, MAX_SECONDS]


def test_one_leaf_takes_it_back() -> None:
    breaker = NoProgressBreaker(clock=manual_clock().monotonic)
    breaker.sampler_joined("s1")
    fail(breaker, "s1")
    breaker.record_outcome("s1", LeaseOutcome.PROGRESS)
    assert (breaker.lease_quota("s1"), breaker.count_put_aside(), breaker.quote_last_error("s1")) == (None, 0, "")
    assert fail(breaker, "s1", FAILURES - 1) == 0.0


def test_what_ends_while_it_is_put_aside_does_not_keep_it_there_longer() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    breaker.sampler_joined("s1")
    assert fail(breaker, "s1", 10 * FAILURES) == FIRST_SECONDS
    clock.now += FIRST_SECONDS
    assert breaker.lease_quota("s1") == FAILURES


def test_a_sampler_that_comes_again_is_still_put_aside() -> None:
    breaker = NoProgressBreaker(clock=manual_clock().monotonic)
    breaker.sampler_joined("s1")
    fail(breaker, "s1")
    breaker.sampler_left("s1")
    assert breaker.count_put_aside() == 0
    breaker.sampler_joined("s1")
    assert (breaker.lease_quota("s1"), breaker.count_put_aside()) == (0, 1)


@pytest.mark.parametrize("outcome", [LeaseOutcome.IDLE, LeaseOutcome.FAILED])
def test_leases_that_come_back_with_nothing_put_it_aside_too(outcome: LeaseOutcome) -> None:
    breaker = NoProgressBreaker(clock=manual_clock().monotonic)
    assert fail(breaker, "s1", outcome=outcome) == FIRST_SECONDS
    assert fail(breaker, "s2", 10 * FAILURES, LeaseOutcome.NEUTRAL) == 0.0


# ---- what a lease came to


def ended(reason: LeaseEndReason, *, leaf: bool = False, cost: Cost | None = None) -> tuple[RolloutGroup, LeaseEnd]:
    table = make_table()
    lease = grant(table)
    if leaf:
        accept(table, chain(lease))
    return table.open_leases[lease], LeaseEnd(lease, reason, unaccounted=cost or Cost())


@pytest.mark.parametrize(
    ("reason", "cost", "outcome"),
    [
        (LeaseEndReason.FAILED, Cost(), LeaseOutcome.FAILED),
        (LeaseEndReason.COMPLETE, Cost(prefilled=1), LeaseOutcome.FAILED),
        (LeaseEndReason.COMPLETE, Cost(), LeaseOutcome.IDLE),
        (LeaseEndReason.BUDGET, Cost(), LeaseOutcome.IDLE),
        (LeaseEndReason.RETURNED, Cost(prefilled=1), LeaseOutcome.IDLE),
        (LeaseEndReason.LOST, Cost(), LeaseOutcome.IDLE),
        (LeaseEndReason.INTERRUPTED, Cost(), LeaseOutcome.NEUTRAL),
    ],
)
def test_what_a_lease_came_to(reason: LeaseEndReason, cost: Cost, outcome: LeaseOutcome) -> None:
    assert LeaseOutcome.classify(*ended(reason, cost=cost)) is outcome
    assert LeaseOutcome.classify(*ended(reason, leaf=True, cost=cost)) is LeaseOutcome.PROGRESS


def test_a_lease_that_was_told_to_stop_is_nobodys_fault() -> None:
    group, end = ended(LeaseEndReason.STOPPED)
    group.stop_requested_at = 1.0
    assert LeaseOutcome.classify(group, end) is LeaseOutcome.NEUTRAL


@pytest.mark.parametrize(("reason", "outcome"), [("logprobs", LeaseOutcome.FAILED), ("age", LeaseOutcome.NEUTRAL)])
def test_a_lease_of_which_all_was_refused_failed_unless_it_came_too_late(reason: str, outcome: LeaseOutcome) -> None:
    group, end = ended(LeaseEndReason.STOPPED)
    group.reject_subtree((0, 0), Cost(), reason, "why")
    group.stop_requested_at = 1.0  # as whoever refuses a subtree tells its sampler
    assert LeaseOutcome.classify(group, group.with_rejected_cost(end)) is outcome


def test_leaves_of_an_earlier_lease_are_no_progress_of_this_one() -> None:
    table = make_table()
    first = grant(table, "good/1")
    accept(table, chain(first))
    table.end_lease(LeaseEnd(first, LeaseEndReason.LOST))
    second = grant(table, "bad/1")
    assert table.open_leases[second].has_leaves
    assert LeaseOutcome.classify(table.open_leases[second], LeaseEnd(second, LeaseEndReason.RETURNED)) is LeaseOutcome.IDLE


# ---- giving up the run


def test_a_run_with_one_sampler_is_given_up_after_leases_and_time() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    clock.now = began = 100.0 + LIMITS.absent_seconds
    breaker.sampler_joined("s1")
    for _ in range(OPENINGS - 1):
        seconds = fail(breaker, "s1")
        assert breaker.reason_to_give_up(trained=False) is None
        clock.now += seconds
    fail(breaker, "s1")
    assert clock.now - began == FIRST_SECONDS * (2 ** (OPENINGS - 1) - 1)
    assert str(breaker.reason_to_give_up(trained=False)).startswith(
        f"The last {FAILURES * OPENINGS} leases, of sampler s1, finished no episode; sampler s1 says: “s1 is broken”. "
    )
    assert "rollout.max_context" in str(breaker.reason_to_give_up(trained=False))
    assert "rollout.max_context" not in str(breaker.reason_to_give_up(trained=True)), "it must stay as it was"


def test_the_first_sampler_of_several_ends_nothing_before_the_others_come() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    breaker.sampler_joined("bad")
    fail_for_good(breaker, clock, "bad")
    assert breaker.reason_to_give_up(trained=False) is None
    clock.now = 100.0 + LIMITS.absent_seconds
    assert breaker.reason_to_give_up(trained=False) is not None


def test_a_burst_of_failures_ends_nothing() -> None:
    breaker = NoProgressBreaker(clock=manual_clock().monotonic)
    breaker.sampler_joined("s1")
    fail(breaker, "s1", 1000)
    assert breaker.reason_to_give_up(trained=False) is None


def test_a_run_goes_on_while_one_sampler_does_not_fail() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    for name in ("bad", "good"):
        breaker.sampler_joined(name)
    fail_for_good(breaker, clock, "bad")
    assert breaker.reason_to_give_up(trained=False) is None
    breaker.sampler_left("good")
    assert breaker.reason_to_give_up(trained=False) is None, "it may come back"
    clock.now += LIMITS.absent_seconds
    assert "of sampler bad, finished no" in str(breaker.reason_to_give_up(trained=False))


def test_samplers_that_lack_a_tool_end_nothing() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    breaker.sampler_joined("s1")
    for _ in range(10):
        clock.now += fail(breaker, "s1", outcome=LeaseOutcome.IDLE)
    assert breaker.reason_to_give_up(trained=False) is None


def test_what_samplers_say_is_theirs_and_short() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    for number in range(5):
        breaker.sampler_joined(f"s{number}")
        fail_for_good(breaker, clock, f"s{number}")
        breaker.record_outcome(f"s{number}", LeaseOutcome.FAILED, "error: the run is over\n\x1b[31m " + "x" * 5000)
    said = str(breaker.reason_to_give_up(trained=False))
    assert "samplers s0, s1, s2 and 2 more, finished no" in said
    assert "sampler s0 says: “error: the run is over" in said
    assert "\n" not in said
    assert len(said) < 1500


def test_a_sampler_has_left_when_its_stream_closed() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    breaker.sampler_joined("good")
    breaker.sampler_left("good")
    clock.now += LIMITS.absent_seconds
    breaker.sampler_joined("bad")
    fail_for_good(breaker, clock, "bad")
    breaker.sampler_left("good")
    assert "of sampler bad, finished no" in str(breaker.reason_to_give_up(trained=False))


def test_samplers_that_were_never_put_aside_are_forgotten() -> None:
    clock = manual_clock()
    breaker = NoProgressBreaker(clock=clock.monotonic)
    for number in range(100):
        breaker.sampler_joined(f"s{number}")
        breaker.sampler_left(f"s{number}")
        clock.now += LIMITS.absent_seconds
    assert len(breaker._circuits) <= 2  # pyright: ignore[reportPrivateUsage]


# ---- whose fault it is


def test_one_sampler_alone_does_not_set_a_question_aside() -> None:
    table = make_table(questions=1)
    breaker = NoProgressBreaker(clock=manual_clock().monotonic)
    attempts, here = QuestionAttempts(breaker), {"bad", "good"}
    for lease in range(10):
        group = table.open_leases[grant(table, "bad/1")]
        end = LeaseEnd(group.lease.id, LeaseEndReason.FAILED)
        excused = attempts.is_excused(group, "bad", here)
        assert excused is (lease > 0)
        assert table.end_lease(end, excused=excused).attempts == 1
    group = table.open_leases[grant(table, "good/1")]
    assert not attempts.is_excused(group, "good", here)
    assert not attempts.is_excused(group, "bad", here), "all have tried"


def test_a_question_that_nobody_can_answer_is_set_aside() -> None:
    """One sampler or three of them: after as many tries."""
    for here in ({"a"}, {"a", "b"}, {"a", "b", "c"}):
        attempts = QuestionAttempts(NoProgressBreaker(clock=manual_clock().monotonic))
        table, leases = make_table(questions=1), 0
        while not table.set_aside_counts:
            name = sorted(here)[leases % len(here)]
            group = table.open_leases[grant(table, f"{name}/1")]
            leases += 1
            table.end_lease(LeaseEnd(group.lease.id, LeaseEndReason.FAILED), excused=attempts.is_excused(group, name, here))
        assert leases == (MAX_ATTEMPTS + LIMITS.lone_repeats if len(here) == 1 else MAX_ATTEMPTS)
    assert MAX_ATTEMPTS + LIMITS.lone_repeats < FAILURES, "a lone sampler with a bad first question is not put aside"


def test_failures_of_a_sampler_put_aside_do_not_count_against_a_question() -> None:
    breaker = NoProgressBreaker(clock=manual_clock().monotonic)
    fail(breaker, "bad")
    table = make_table()
    group = table.open_leases[grant(table, "bad/1")]
    assert QuestionAttempts(breaker).is_excused(group, "bad", {"bad", "good"})
    assert QuestionAttempts(breaker).is_excused(group, "bad", {"bad"}), "another may come"


# ---- over gRPC


async def test_one_bad_sampler_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It fails as fast as it can, under two incarnations; the other trains on, and no question is set aside."""
    caplog.set_level(logging.WARNING)
    table = make_table(questions=40, batch=8, max_lag=8)
    async with (
        serve_intake(table, tmp_path, breaker_limits=LONG_OPEN) as intake,
        SamplerPeer.join(intake.address, name="good") as good,
    ):
        failed = 0
        for incarnation in (1, 2):
            async with SamplerPeer.join(intake.address, name="bad", incarnation=incarnation) as bad:
                await bad.receive("welcome")
                await bad.set_demand(4)
                while not intake.coordinator.breaker.is_put_aside("bad"):
                    await bad.fail((await bad.receive("lease")).id, "Learner, stop!\nerror: now")
                    failed += 1
                    await intake.until(
                        lambda seen=failed: intake.sample("leases_ended_total", kind="train", reason="failed") >= seen
                    )
        assert failed == FAILURES
        await intake.until(lambda: intake.sample("samplers_put_aside") == 0)  # it has left
        await good.set_demand(2)
        for _ in range(6):
            await good.roll_out((await good.receive("lease")).id)
        assert not intake.coordinator.failure.done()
        assert not table.set_aside_counts
    said = [record.getMessage() for record in caplog.records if "put aside" in record.getMessage()]
    assert said == [
        "sampler bad is put aside for 30 s, since its last leases failed; sampler bad says: “Learner, stop! error: now”"
    ]


async def test_leases_that_are_only_returned_are_not_granted_without_end(tmp_path: Path) -> None:
    async with (
        serve_intake(make_table(), tmp_path, breaker_limits=LONG_OPEN) as intake,
        SamplerPeer.join(intake.address) as idler,
    ):
        await idler.set_demand(1)
        for _ in range(FAILURES):
            lease = (await idler.receive("lease")).id
            await idler.send_request(lease_end=returned(lease))
        await intake.until(lambda: intake.coordinator.breaker.is_put_aside("s1"))
        assert intake.sample("samplers_put_aside") == 1
        await intake.until(lambda: not intake.coordinator.lease_table.open_leases)
        async with SamplerPeer.join(intake.address, name="s2") as other:
            await other.set_demand(1)
            await other.roll_out((await other.receive("lease")).id)


async def test_who_wants_very_many_leaves_others_their_share(tmp_path: Path) -> None:
    table = make_table(batch=4, max_lag=1)
    async with serve_intake(table, tmp_path) as intake, SamplerPeer.join(intake.address, name="greedy") as greedy:
        table.version, version = None, table.version
        await greedy.set_demand(1000)
        async with SamplerPeer.join(intake.address, name="modest") as modest:
            await modest.set_demand(4)
            await intake.until(lambda: sum(peer.demand for peer in intake.coordinator.open_sessions.values()) == 1004)
            table.version = version
            intake.coordinator.dispatcher.wake_dispatcher()
            for sampler in (greedy, modest):
                for _ in range(4):
                    await asyncio.wait_for(sampler.receive("lease"), 10)


def returned(lease: str) -> pb.LeaseEnd:
    return lease_end_to_pb(LeaseEnd(lease, LeaseEndReason.RETURNED, error="I would rather not"))


def test_a_lease_that_was_excused_is_so_after_a_restart(tmp_path: Path) -> None:
    """The journal says so: who was there is not known any more."""
    table, again = make_table(questions=1), make_table(questions=1)
    work = table.next_lease()
    assert work is not None
    group = table.grant_lease(*work, "s1/1", 0.0)
    records = [lease_events.grant_event(*work, group.holder)]
    end = LeaseEnd(group.lease.id, LeaseEndReason.FAILED)
    table.end_lease(end, excused=True)
    records.append(lease_events.lease_end_event(end, excused=True))
    recorder = RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=1)
    for record in records:
        lease_events.replay_event(again, recorder, record)
    assert again.snapshot_table() == table.snapshot_table()
    assert not again.open_leases
