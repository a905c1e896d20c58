"""Tools and engines that are away: waited for together, paid for once, blamed on nobody."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from services.sampler.expansion import availability, retries
from services.sampler.expansion.expander import Expander, Gate
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, Session, deep, lease, plan, turns
from tests.sampler.growing import Growing
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import StepStatus, Subtree
from treegrpo.errors import EngineAwayError, ToolAwayError

CHAIN, TREES = plan(1, 0, 0), plan(2, 1, 3)
GONE = ToolAwayError("tool", "nowhere", "does not answer", certain=True)
SLOW = ToolAwayError("tool", "nowhere", "does not answer in time", certain=False)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(availability, "PROBE_SECONDS", (0.001,))
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.0)


async def test_a_call_that_ran_out_of_time_is_tried_again_for_nothing_if_the_tool_was_away() -> None:
    environment = FakeEnvironment()
    environment.away = SLOW
    growing = Growing(FakeEngine(deep(1)), environment)
    end = asyncio.create_task(growing.grow(lease(TREES)))
    await growing.until_away()
    environment.away = None
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert growing.failed == []
    assert sum(s.cost.tool_calls for s in growing.subtrees) == environment.calls


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
    growing = Growing(FakeEngine(deep(1)), environment)
    growing.expander = Expander(FakeEngine(deep(1)), environment, FakeText(), retries=0, metrics=growing.metrics)
    end = asyncio.create_task(growing.grow(lease(plan(4, 0, 0))))
    await asked.wait()
    while growing.errors("ToolAwayError") != 4:  # noqa: ASYNC110
        await asyncio.sleep(0)
    environment.away = None
    answered.set()
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert len(growing.subtrees) == 4


async def test_when_the_one_that_probes_has_to_stop_another_goes_on() -> None:
    environment, gates = FakeEnvironment(), [Gate(), Gate()]
    environment.away = GONE
    growing = Growing(FakeEngine(deep(1)), environment)
    ends = [
        asyncio.create_task(growing.expander.grow(lease(CHAIN, name=f"lease-{n}"), growing.subtrees.append, gate))
        for n, gate in enumerate(gates)
    ]
    await growing.until_away()
    gates[0].stop()
    assert (await ends[0]).reason is LeaseEndReason.RETURNED
    probes = environment.probes
    while environment.probes == probes:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    environment.away = None
    assert (await ends[1]).reason is LeaseEndReason.COMPLETE


async def test_a_tool_that_stays_away_ends_the_lease_as_returned_with_what_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "PATIENCE_SECONDS", 0.05)
    environment = FakeEnvironment()

    def script(prefix: str) -> str:
        if turns(prefix) == 1:
            environment.away = GONE
        return "s!"

    growing = Growing(FakeEngine(script), environment)
    end = await growing.grow(lease(plan(1, 1, 2)))
    assert end.reason is LeaseEndReason.RETURNED
    assert end.error.startswith("the tool at nowhere does not answer; it was waited for")
    assert growing.subtrees == [], "what was left out can be made under another lease"
    assert (end.forgone, end.unaccounted.tool_calls, end.unaccounted.decoded) == (2, 1, 4)
    assert growing.errors("DeadlineError") == 1


async def test_a_lease_keeps_what_was_done_before_its_tool_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "PATIENCE_SECONDS", 0.05)
    environment = FakeEnvironment()
    growing = Growing(FakeEngine(deep(1)), environment)
    one = lease(plan(1, 1, 8))

    def emit(subtree: Subtree) -> None:
        growing.subtrees.append(subtree)
        environment.away = GONE

    end = await growing.expander.grow(one, emit, growing.gate)
    assert end.reason is LeaseEndReason.RETURNED
    done = list(growing.subtrees)
    assert 1 <= len(done) < one.plan.leaves
    assert all(subtree.leaves for subtree in done)
    assert end.forgone == one.plan.leaves - len(done)
    environment.away = None
    again = replace(one, id="lease-2", accepted=tuple(done))
    assert (await Growing(FakeEngine(deep(1)), environment).grow(again)) == LeaseEnd("lease-2", LeaseEndReason.COMPLETE)


async def test_nothing_is_begun_while_a_tool_is_away_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "PATIENCE_SECONDS", 0.02)
    environment, engine = FakeEnvironment(), FakeEngine(deep(1))
    environment.away = GONE
    growing = Growing(engine, environment)
    await growing.grow(lease(CHAIN))
    begun = len(engine.prefixes)
    end = await growing.grow(lease(CHAIN, name="next"))
    assert (end.reason, len(engine.prefixes)) == (LeaseEndReason.RETURNED, begun)
    assert "nothing was begun" in end.error
    environment.away = None
    await growing.tools.over()
    assert (await growing.grow(lease(CHAIN, name="last"))).reason is LeaseEndReason.COMPLETE


async def test_the_word_to_stop_ends_the_waiting_at_once() -> None:
    environment = FakeEnvironment()
    environment.away = GONE
    growing = Growing(FakeEngine(deep(1)), environment)
    end = asyncio.create_task(growing.grow(lease(TREES)))
    await growing.until_away()
    growing.gate.stop()
    assert (await asyncio.wait_for(end, 5)).reason is LeaseEndReason.RETURNED
    assert growing.subtrees == []


async def test_what_runs_when_the_gate_is_cut_is_left_out_and_accounted_for() -> None:
    stuck = asyncio.Event()

    async def script(prefix: str) -> str:
        if turns(prefix) == 1:
            stuck.set()
            await asyncio.Event().wait()
        return "s!"

    growing = Growing(FakeEngine(script), FakeEnvironment())
    end = asyncio.create_task(growing.grow(lease(CHAIN)))
    await stuck.wait()
    growing.gate.cut()
    ended = await asyncio.wait_for(end, 5)
    assert (ended.reason, ended.unaccounted.decoded, ended.unaccounted.tool_calls) == (LeaseEndReason.RETURNED, 2, 1)


async def test_a_probe_that_never_returns_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "PATIENCE_SECONDS", 0.02)
    environment = FakeEnvironment()
    environment.away = SLOW

    async def probe() -> None:
        await asyncio.Event().wait()

    environment.probe = probe
    growing = Growing(FakeEngine(deep(1)), environment)
    assert (await asyncio.wait_for(growing.grow(lease(TREES)), 5)).reason is LeaseEndReason.RETURNED


async def test_an_engine_that_is_away_is_waited_for_in_the_same_way() -> None:
    engine = FakeEngine(deep(1))
    engine.away = EngineAwayError("engine", "http://engine", "does not answer", certain=True)
    growing = Growing(engine, FakeEnvironment())
    end = asyncio.create_task(growing.grow(lease(TREES)))
    await growing.until_away()
    assert growing.engine.away
    assert not growing.tools.away
    engine.away = None
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert growing.failed == []


async def test_a_state_performed_again_is_not_paid_for_while_its_tool_is_away() -> None:
    """Replay: every second branch performs its path again, and meets the outage there."""
    environment = FakeEnvironment("replay")
    growing = Growing(FakeEngine(deep(2)), environment)

    def emit(subtree: Subtree) -> None:
        growing.subtrees.append(subtree)
        if subtree.index == 0:
            environment.away = GONE

    end = asyncio.create_task(growing.expander.grow(lease(plan(1, 1, 6)), emit, growing.gate))
    await growing.until_away()
    environment.away = None
    assert (await end).reason is LeaseEndReason.COMPLETE
    assert sum(s.cost.tool_calls for s in growing.subtrees) == environment.calls


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
    growing = Growing(FakeEngine(deep(1)), environment)
    caplog.set_level("INFO")
    await growing.grow(lease(plan(2, 0, 0)))
    assert growing.failed == [StepStatus.TOOL_ERROR]
    assert "answers a probe with KeyError" in caplog.text
