"""Unavailable tools and engines: one shared probe, no cost, and no question held responsible."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from services.sampler.expansion.expander import LeaseControl
from tests.sampler.expansion_harness import FAST, ExpansionHarness
from tests.sampler.fakes import FakeEngine, FakeEnvironment, Session, deep, lease, plan, turns
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import StepStatus, Subtree
from treegrpo.errors import EngineAwayError, ToolAwayError

IMPATIENT = replace(FAST, wait_limit=0.05)
CHAIN, TREES = plan(1, 0, 0), plan(2, 1, 3)
GONE = ToolAwayError("tool", "nowhere", "does not answer", certain=True)
SLOW = ToolAwayError("tool", "nowhere", "does not answer in time", certain=False)


async def test_a_call_that_timed_out_costs_nothing_if_the_tool_was_unavailable() -> None:
    environment = FakeEnvironment()
    environment.away = SLOW
    harness = ExpansionHarness(FakeEngine(deep(1)), environment)
    end = asyncio.create_task(harness.expand(lease(TREES)))
    await harness.until_changed()
    environment.away = None
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert harness.failed == []
    assert sum(s.cost.tool_calls for s in harness.subtrees) == environment.calls


async def test_all_branches_wait_for_one_probe() -> None:
    environment, asked, answered = FakeEnvironment(), asyncio.Event(), asyncio.Event()
    environment.away = GONE
    probing = 0

    async def probe() -> None:
        nonlocal probing
        probing += 1
        assert probing == 1
        asked.set()
        await answered.wait()

    environment.probe = probe
    harness = ExpansionHarness(FakeEngine(deep(1)), environment)
    end = asyncio.create_task(harness.expand(lease(plan(4, 0, 0))))
    await asked.wait()
    while harness.errors("ToolAwayError") != 4:  # noqa: ASYNC110
        await asyncio.sleep(0)
    environment.away = None
    answered.set()
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert len(harness.subtrees) == 4


async def test_when_the_probing_branch_is_stopped_another_takes_over() -> None:
    environment, controls = FakeEnvironment(), [LeaseControl(), LeaseControl()]
    environment.away = GONE
    harness = ExpansionHarness(FakeEngine(deep(1)), environment)
    ends = [
        asyncio.create_task(harness.expander.expand_lease(lease(CHAIN, name=f"lease-{n}"), harness.subtrees.append, control))
        for n, control in enumerate(controls)
    ]
    await harness.until_changed()
    controls[0].stop_expanding()
    assert (await ends[0]).reason is LeaseEndReason.RETURNED
    probes = environment.probes
    while environment.probes == probes:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    environment.away = None
    assert (await ends[1]).reason is LeaseEndReason.COMPLETE


async def test_a_tool_that_stays_unavailable_ends_the_lease_with_what_was_spent() -> None:
    environment = FakeEnvironment()

    def script(prefix: str) -> str:
        if turns(prefix) == 1:
            environment.away = GONE
        return "s!"

    harness = ExpansionHarness(FakeEngine(script), environment, timings=IMPATIENT)
    end = await harness.expand(lease(plan(1, 1, 2)))
    assert end.reason is LeaseEndReason.RETURNED
    assert end.error.startswith("the tool at nowhere does not answer; waited ")
    assert harness.subtrees == [], "what was left out can be made under another lease"
    assert (end.forgone, end.unaccounted.tool_calls, end.unaccounted.decoded) == (2, 1, 4)
    assert harness.errors("DeadlineError") == 1


async def test_a_lease_keeps_what_was_done_before_its_tool_went_away() -> None:
    environment = FakeEnvironment()
    harness = ExpansionHarness(FakeEngine(deep(1)), environment, timings=IMPATIENT)
    one = lease(plan(1, 1, 8))

    def emit(subtree: Subtree) -> None:
        harness.subtrees.append(subtree)
        environment.away = GONE

    end = await harness.expander.expand_lease(one, emit, harness.control)
    assert end.reason is LeaseEndReason.RETURNED
    done = list(harness.subtrees)
    assert 1 <= len(done) < one.plan.leaves
    assert all(subtree.leaves for subtree in done)
    assert end.forgone == one.plan.leaves - len(done)
    environment.away = None
    again = replace(one, id="lease-2", accepted=tuple(done))
    assert (await ExpansionHarness(FakeEngine(deep(1)), environment).expand(again)) == LeaseEnd(
        "lease-2", LeaseEndReason.COMPLETE
    )


async def test_nothing_is_begun_while_a_tool_is_away_for_too_long() -> None:
    environment, engine = FakeEnvironment(), FakeEngine(deep(1))
    environment.away = GONE
    harness = ExpansionHarness(engine, environment, timings=IMPATIENT)
    await harness.expand(lease(CHAIN))
    begun = len(engine.prefixes)
    end = await harness.expand(lease(CHAIN, name="next"))
    assert (end.reason, len(engine.prefixes)) == (LeaseEndReason.RETURNED, begun)
    assert "no branch was started" in end.error
    environment.away = None
    await harness.tools.wait_available()
    assert (await harness.expand(lease(CHAIN, name="last"))).reason is LeaseEndReason.COMPLETE


async def test_stopping_a_lease_ends_its_waiting_at_once() -> None:
    environment = FakeEnvironment()
    environment.away = GONE
    harness = ExpansionHarness(FakeEngine(deep(1)), environment)
    end = asyncio.create_task(harness.expand(lease(TREES)))
    await harness.until_changed()
    harness.control.stop_expanding()
    assert (await asyncio.wait_for(end, 5)).reason is LeaseEndReason.RETURNED
    assert harness.subtrees == []


async def test_what_runs_when_a_lease_is_cancelled_is_left_out_and_counted() -> None:
    stuck = asyncio.Event()

    async def script(prefix: str) -> str:
        if turns(prefix) == 1:
            stuck.set()
            await asyncio.Event().wait()
        return "s!"

    harness = ExpansionHarness(FakeEngine(script), FakeEnvironment())
    end = asyncio.create_task(harness.expand(lease(CHAIN)))
    await stuck.wait()
    harness.control.cancel_running()
    ended = await asyncio.wait_for(end, 5)
    assert (ended.reason, ended.unaccounted.decoded, ended.unaccounted.tool_calls) == (LeaseEndReason.RETURNED, 2, 1)


async def test_a_probe_that_never_returns_holds_up_no_end() -> None:
    environment = FakeEnvironment()
    environment.away = SLOW

    async def probe() -> None:
        await asyncio.Event().wait()

    environment.probe = probe
    harness = ExpansionHarness(FakeEngine(deep(1)), environment, timings=IMPATIENT)
    assert (await asyncio.wait_for(harness.expand(lease(TREES)), 5)).reason is LeaseEndReason.RETURNED


async def test_an_engine_that_is_away_is_waited_for_in_the_same_way() -> None:
    engine = FakeEngine(deep(1))
    engine.away = EngineAwayError("engine", "http://engine", "does not answer", certain=True)
    harness = ExpansionHarness(engine, FakeEnvironment())
    end = asyncio.create_task(harness.expand(lease(TREES)))
    await harness.until_changed()
    assert harness.engine.unavailable
    assert not harness.tools.unavailable
    engine.away = None
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert harness.failed == []


async def test_a_state_performed_again_is_not_paid_for_while_its_tool_is_away() -> None:
    """Replay: every second branch performs its path again, and meets the outage there."""
    environment = FakeEnvironment("replay")
    harness = ExpansionHarness(FakeEngine(deep(2)), environment)

    def emit(subtree: Subtree) -> None:
        harness.subtrees.append(subtree)
        if subtree.index == 0:
            environment.away = GONE

    end = asyncio.create_task(harness.expander.expand_lease(lease(plan(1, 1, 6)), emit, harness.control))
    await harness.until_changed()
    environment.away = None
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert sum(s.cost.tool_calls for s in harness.subtrees) == environment.calls


async def test_a_tool_that_answers_a_probe_in_its_own_way_is_there(caplog: pytest.LogCaptureFixture) -> None:
    environment = FakeEnvironment()
    broken = iter([True])

    def fail(_session: Session, _action: str) -> bool:
        if next(broken, False):
            raise SLOW
        return False

    async def probe() -> None:
        raise KeyError("probe")

    environment.fail, environment.probe = fail, probe
    harness = ExpansionHarness(FakeEngine(deep(1)), environment)
    caplog.set_level("INFO")
    await harness.expand(lease(plan(2, 0, 0)))
    assert harness.failed == [StepStatus.TOOL_ERROR]
    assert "answered a probe with KeyError" in caplog.text
