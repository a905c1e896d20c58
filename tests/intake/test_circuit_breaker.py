"""One bad sampler costs itself alone: it is put aside, others go on, and no question is blamed for it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from learner.intake.leases import circuit_breaker
from learner.intake.leases.circuit_breaker import (
    ABSENT_SECONDS,
    FAILURES,
    FIRST_SECONDS,
    MOST_SECONDS,
    OPENINGS,
    REPEATS,
    Attempts,
    NoProgressBreaker,
    Verdict,
)
from learner.intake.leases.rollout_group import TRIES, OpenGroup
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence import lease_events
from tests.intake.builders import book, chain, grant
from tests.intake.process_harness import Sampler
from tests.intake.server_harness import serve_intake
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.codec import lease_end_to_pb


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fail(breaker: NoProgressBreaker, name: str, leases: int = FAILURES, verdict: Verdict = Verdict.FAILED) -> float:
    """So many leases in a row; for how long the sampler is then put aside."""
    return max(breaker.judge(name, verdict, f"{name} is broken") for _ in range(leases))


def fail_for_good(breaker: NoProgressBreaker, clock: Clock, name: str) -> None:
    for _ in range(OPENINGS):
        clock.now += fail(breaker, name)


# ---- putting a sampler aside


def test_a_sampler_that_only_fails_is_put_aside_for_longer_each_time() -> None:
    clock, asked = Clock(), list[float]()
    breaker = NoProgressBreaker(clock)
    breaker.came("s1")
    assert fail(breaker, "s1", FAILURES - 1) == 0.0
    assert breaker.quota("s1") is None
    for _ in range(8):
        seconds = fail(breaker, "s1")
        asked.append(seconds)
        assert (breaker.quota("s1"), breaker.aside()) == (0, 1)
        clock.now += seconds
        assert breaker.quota("s1") == FAILURES, "a trial"
    assert asked == [FIRST_SECONDS, 2.0, 4.0, 8.0, 16.0, MOST_SECONDS, MOST_SECONDS, MOST_SECONDS]


def test_one_leaf_takes_it_back() -> None:
    breaker = NoProgressBreaker(Clock())
    breaker.came("s1")
    fail(breaker, "s1")
    breaker.judge("s1", Verdict.PROGRESS)
    assert (breaker.quota("s1"), breaker.aside(), breaker.said("s1")) == (None, 0, "")
    assert fail(breaker, "s1", FAILURES - 1) == 0.0


def test_what_ends_while_it_is_put_aside_does_not_keep_it_there_longer() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    breaker.came("s1")
    assert fail(breaker, "s1", 10 * FAILURES) == FIRST_SECONDS
    clock.now += FIRST_SECONDS
    assert breaker.quota("s1") == FAILURES


def test_a_sampler_that_comes_again_is_still_put_aside() -> None:
    breaker = NoProgressBreaker(Clock())
    breaker.came("s1")
    fail(breaker, "s1")
    breaker.left("s1")
    assert breaker.aside() == 0
    breaker.came("s1")
    assert (breaker.quota("s1"), breaker.aside()) == (0, 1)


@pytest.mark.parametrize("verdict", [Verdict.IDLE, Verdict.FAILED])
def test_leases_that_come_back_with_nothing_put_it_aside_too(verdict: Verdict) -> None:
    breaker = NoProgressBreaker(Clock())
    assert fail(breaker, "s1", verdict=verdict) == FIRST_SECONDS
    assert fail(breaker, "s2", 10 * FAILURES, Verdict.NEUTRAL) == 0.0


# ---- what a lease came to


def ended(reason: LeaseEndReason, *, leaf: bool = False, cost: Cost | None = None) -> tuple[OpenGroup, LeaseEnd]:
    made = book()
    lease = grant(made)
    if leaf:
        made.accept(chain(lease))
    return made.open[lease], LeaseEnd(lease, reason, unaccounted=cost or Cost())


@pytest.mark.parametrize(
    ("reason", "cost", "verdict"),
    [
        (LeaseEndReason.FAILED, Cost(), Verdict.FAILED),
        (LeaseEndReason.COMPLETE, Cost(prefilled=1), Verdict.FAILED),
        (LeaseEndReason.COMPLETE, Cost(), Verdict.IDLE),
        (LeaseEndReason.BUDGET, Cost(), Verdict.IDLE),
        (LeaseEndReason.RETURNED, Cost(prefilled=1), Verdict.IDLE),
        (LeaseEndReason.LOST, Cost(), Verdict.IDLE),
        (LeaseEndReason.INTERRUPTED, Cost(), Verdict.NEUTRAL),
    ],
)
def test_what_a_lease_came_to(reason: LeaseEndReason, cost: Cost, verdict: Verdict) -> None:
    assert Verdict.of(*ended(reason, cost=cost)) is verdict
    assert Verdict.of(*ended(reason, leaf=True, cost=cost)) is Verdict.PROGRESS


def test_a_lease_that_was_told_to_stop_is_nobodys_fault() -> None:
    group, end = ended(LeaseEndReason.STOPPED)
    group.told_at = 1.0
    assert Verdict.of(group, end) is Verdict.NEUTRAL


@pytest.mark.parametrize(("reason", "verdict"), [("logprobs", Verdict.FAILED), ("age", Verdict.NEUTRAL)])
def test_a_lease_of_which_all_was_refused_failed_unless_it_came_too_late(reason: str, verdict: Verdict) -> None:
    group, end = ended(LeaseEndReason.STOPPED)
    group.refuse((0, 0), Cost(), reason, "why")
    group.told_at = 1.0  # as whoever refuses a subtree tells its sampler
    assert Verdict.of(group, group.settle(end)) is verdict


def test_leaves_of_an_earlier_lease_are_no_progress_of_this_one() -> None:
    made = book()
    first = grant(made, "good/1")
    made.accept(chain(first))
    made.ended(LeaseEnd(first, LeaseEndReason.LOST))
    second = grant(made, "bad/1")
    assert made.open[second].has_leaves
    assert Verdict.of(made.open[second], LeaseEnd(second, LeaseEndReason.RETURNED)) is Verdict.IDLE


# ---- giving up the run


def test_a_run_with_one_sampler_is_given_up_after_leases_and_time() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    clock.now = began = 100.0 + ABSENT_SECONDS
    breaker.came("s1")
    for _ in range(OPENINGS - 1):
        seconds = fail(breaker, "s1")
        assert breaker.hopeless(trained=False) is None
        clock.now += seconds
    fail(breaker, "s1")
    assert clock.now - began == FIRST_SECONDS * (2 ** (OPENINGS - 1) - 1)
    assert str(breaker.hopeless(trained=False)).startswith(
        f"The last {FAILURES * OPENINGS} leases, of sampler s1, led to no finished episode; sampler s1 says: “s1 is broken”. "
    )
    assert "rollout.max_context" in str(breaker.hopeless(trained=False))
    assert "rollout.max_context" not in str(breaker.hopeless(trained=True)), "it must stay as it was"


def test_the_first_sampler_of_several_ends_nothing_before_the_others_come() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    breaker.came("bad")
    fail_for_good(breaker, clock, "bad")
    assert breaker.hopeless(trained=False) is None
    clock.now = 100.0 + ABSENT_SECONDS
    assert breaker.hopeless(trained=False) is not None


def test_a_burst_of_failures_ends_nothing() -> None:
    breaker = NoProgressBreaker(Clock())
    breaker.came("s1")
    fail(breaker, "s1", 1000)
    assert breaker.hopeless(trained=False) is None


def test_a_run_goes_on_while_one_sampler_does_not_fail() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    for name in ("bad", "good"):
        breaker.came(name)
    fail_for_good(breaker, clock, "bad")
    assert breaker.hopeless(trained=False) is None
    breaker.left("good")
    assert breaker.hopeless(trained=False) is None, "it may come back"
    clock.now += ABSENT_SECONDS
    assert "of sampler bad, led to" in str(breaker.hopeless(trained=False))


def test_samplers_that_lack_a_tool_end_nothing() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    breaker.came("s1")
    for _ in range(10):
        clock.now += fail(breaker, "s1", verdict=Verdict.IDLE)
    assert breaker.hopeless(trained=False) is None


def test_what_samplers_say_is_theirs_and_short() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    for number in range(5):
        breaker.came(f"s{number}")
        fail_for_good(breaker, clock, f"s{number}")
        breaker.judge(f"s{number}", Verdict.FAILED, "error: the run is over\n\x1b[31m " + "x" * 5000)
    said = str(breaker.hopeless(trained=False))
    assert "samplers s0, s1, s2 and 2 more, led to" in said
    assert "sampler s0 says: “error: the run is over" in said
    assert "\n" not in said
    assert len(said) < 1500


def test_a_sampler_has_left_when_its_stream_closed_not_when_its_leases_are_lost() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    breaker.came("good")
    breaker.left("good")
    clock.now += ABSENT_SECONDS
    breaker.came("bad")
    fail_for_good(breaker, clock, "bad")
    breaker.left("good")
    assert "of sampler bad, led to" in str(breaker.hopeless(trained=False))


def test_samplers_that_were_never_put_aside_are_forgotten() -> None:
    clock = Clock()
    breaker = NoProgressBreaker(clock)
    for number in range(100):
        breaker.came(f"s{number}")
        breaker.left(f"s{number}")
        clock.now += ABSENT_SECONDS
    assert len(breaker._circuits) <= 2  # pyright: ignore[reportPrivateUsage]


# ---- whose fault it is


def test_one_sampler_alone_does_not_set_a_question_aside() -> None:
    made = book(questions=1)
    breaker = NoProgressBreaker(Clock())
    attempts, here = Attempts(breaker), {"bad", "good"}
    for lease in range(10):
        group = made.open[grant(made, "bad/1")]
        end = LeaseEnd(group.lease.id, LeaseEndReason.FAILED)
        excused = attempts.excused(group, "bad", here)
        assert excused is (lease > 0)
        assert made.ended(end, excused=excused).tries == 1
    group = made.open[grant(made, "good/1")]
    assert not attempts.excused(group, "good", here)
    assert not attempts.excused(group, "bad", here), "all have tried"


def test_a_question_that_nobody_can_answer_is_set_aside() -> None:
    """One sampler or three of them: after as many tries."""
    for here in ({"a"}, {"a", "b"}, {"a", "b", "c"}):
        attempts = Attempts(NoProgressBreaker(Clock()))
        made, leases = book(questions=1), 0
        while not made.set_aside:
            name = sorted(here)[leases % len(here)]
            group = made.open[grant(made, f"{name}/1")]
            leases += 1
            made.ended(LeaseEnd(group.lease.id, LeaseEndReason.FAILED), excused=attempts.excused(group, name, here))
        assert leases == (TRIES + REPEATS if len(here) == 1 else TRIES)
    assert TRIES + REPEATS < FAILURES, "a lone sampler whose first question is a bad one is not put aside for it"


def test_a_sampler_that_is_put_aside_blames_nothing() -> None:
    breaker = NoProgressBreaker(Clock())
    fail(breaker, "bad")
    made = book()
    group = made.open[grant(made, "bad/1")]
    assert Attempts(breaker).excused(group, "bad", {"bad", "good"})
    assert Attempts(breaker).excused(group, "bad", {"bad"}), "another may come"


# ---- over gRPC


async def test_one_bad_sampler_costs_itself_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails as fast as it can, under two incarnations; the other trains on, and no question is set aside."""
    monkeypatch.setattr(circuit_breaker, "FIRST_SECONDS", 1000.0)
    caplog.set_level(logging.WARNING)
    made = book(questions=40, batch=8, max_lag=8)
    async with serve_intake(made, tmp_path) as door, Sampler.join(door.address, name="good") as good:
        failed = 0
        for incarnation in (1, 2):
            async with Sampler.join(door.address, name="bad", incarnation=incarnation) as bad:
                await bad.hear("welcome")
                await bad.want(4)
                while not door.desk.breaker.put_aside("bad"):
                    await bad.fail((await bad.hear("lease")).id, "Learner, stop!\nerror: now")
                    failed += 1
                    await door.until(lambda seen=failed: door.sample("leases_ended_total", kind="train", reason="failed") >= seen)
        assert failed == FAILURES
        await door.until(lambda: door.sample("samplers_put_aside") == 0)  # it has left
        await good.want(2)
        for _ in range(6):
            await good.roll_out((await good.hear("lease")).id)
        assert not door.desk.broken.done()
        assert not made.set_aside
    said = [record.getMessage() for record in caplog.records if "put aside" in record.getMessage()]
    assert said == [
        "sampler bad is put aside for 30 s, its last leases came to nothing; sampler bad says: “Learner, stop! error: now”"
    ]


async def test_leases_that_are_only_returned_are_not_granted_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "FIRST_SECONDS", 1000.0)
    async with serve_intake(book(), tmp_path) as door, Sampler.join(door.address) as idler:
        await idler.want(1)
        for _ in range(FAILURES):
            lease = (await idler.hear("lease")).id
            await idler.say(lease_end=returned(lease))
        await door.until(lambda: door.desk.breaker.put_aside("s1"))
        assert door.sample("samplers_put_aside") == 1
        await door.until(lambda: not door.desk.book.open)
        async with Sampler.join(door.address, name="s2") as other:
            await other.want(1)
            await other.roll_out((await other.hear("lease")).id)


async def test_who_wants_very_many_leaves_others_their_share(tmp_path: Path) -> None:
    made = book(batch=4, max_lag=1)
    async with serve_intake(made, tmp_path) as door, Sampler.join(door.address, name="greedy") as greedy:
        made.version, version = None, made.version
        await greedy.want(1000)
        async with Sampler.join(door.address, name="modest") as modest:
            await modest.want(4)
            await door.until(lambda: sum(peer.demand for peer in door.desk.open_sessions.values()) == 1004)
            made.version = version
            door.desk.grant()
            for sampler in (greedy, modest):
                for _ in range(4):
                    await asyncio.wait_for(sampler.hear("lease"), 10)


def returned(lease: str) -> pb.LeaseEnd:
    return lease_end_to_pb(LeaseEnd(lease, LeaseEndReason.RETURNED, error="I would rather not"))


def test_a_lease_that_was_excused_is_so_after_a_restart(tmp_path: Path) -> None:
    """The journal says so: who was there is not known any more."""
    made, again = book(questions=1), book(questions=1)
    work = made.next_lease()
    assert work is not None
    group = made.granted(*work, "s1/1", 0.0)
    records = [lease_events.granted(*work, group.holder)]
    end = LeaseEnd(group.lease.id, LeaseEndReason.FAILED)
    made.ended(end, excused=True)
    records.append(lease_events.ended(end, excused=True))
    reporter = RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=1)
    for record in records:
        lease_events.replay(again, reporter, record)
    assert again.state() == made.state()
    assert not again.open
