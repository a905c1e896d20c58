"""Samplers that die, hang, are cut off or come back too late: nothing is lost, nothing is counted twice. Over gRPC."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest

from learner.intake.leases.circuit_breaker import BreakerLimits
from tests.intake.builders import PLAN, complete, make_table
from tests.intake.process_harness import SamplerPeer
from tests.intake.server_harness import IntakeFixture, serve_intake, short_timings
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseEnd, LeaseEndReason, LeaseKind
from treegrpo.core.step import PolicyVersion
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.codec import lease_end_to_pb
from treegrpo.wire.control import Member

serving = partial(serve_intake, timings=short_timings())


async def beat(sampler: SamplerPeer) -> None:
    while True:
        await sampler.send_request(heartbeat=pb.Heartbeat())
        await asyncio.sleep(0.05)


def balanced(intake: IntakeFixture) -> bool:
    return all(intake.coordinator.lease_table.ledger.imbalance(kind) == Budget() for kind in LeaseKind)


async def test_a_sampler_that_hangs_loses_its_lease_to_another_who_goes_on(tmp_path: Path) -> None:
    """Its connection stays open all the while, and it comes back."""
    async with serving(make_table(total=1), tmp_path) as intake, SamplerPeer.join(intake.address, name="hangs") as hung:
        await hung.set_demand(1)
        lost = await hung.receive("lease")
        await hung.send_chain(lost.id)
        await hung.receive("ack")
        async with SamplerPeer.join(intake.address, name="goes-on") as other:
            beating = asyncio.create_task(beat(other))
            await other.set_demand(1)
            again = await other.receive("lease")
            assert (again.question, again.seed) == (lost.question, lost.seed)
            assert again.id != lost.id
            assert [(s.lease, s.tree, s.index) for s in again.accepted] == [(lost.id, 0, 0)]
            assert Budget(again.grant.tokens, again.grant.tool_calls) == PLAN.grant - Budget(28, 2)  # what the chain has cost
            with pytest.raises(grpc.aio.AioRpcError, match="Nothing came for"):
                await hung.receive("lease")
            async with SamplerPeer.join(intake.address, name="hangs", leases=(lost.id,)) as back:
                assert list((await back.receive("welcome")).void_leases) == [lost.id]
                await back.send_chain(lost.id, tree=1)
                assert (await back.receive("ack")).refusal == f"Lease {lost.id} is not open; its subtrees are refused."
            await other.send_chain(again.id, tree=1)
            await other.receive("ack")
            await other.send_request(lease_end=lease_end_to_pb(complete(again.id)))
            await intake.until(lambda: intake.coordinator.lease_table.train_queue.closed_count == 1)
            beating.cancel()
        (group,) = intake.coordinator.lease_table.train_queue.ready_groups
        assert [(s.lease, s.tree) for s in group.subtrees] == [(lost.id, 0), (again.id, 1)]
        assert intake.sample("budget_spent_total", kind="train", currency="tokens") == 2 * 28
        assert intake.sample("leases_ended_total", kind="train", reason="lost") == 1
        assert intake.sample("rollout_leaves_dropped_total", reason="lease") == 1
        assert balanced(intake)


async def test_what_a_late_sampler_has_is_taken_while_nobody_else_goes_on(tmp_path: Path) -> None:
    async with serving(make_table(), tmp_path) as intake:
        async with SamplerPeer.join(intake.address) as first:
            await first.set_demand(1)
            lost = await first.receive("lease")
            await first.send_chain(lost.id)
            await first.receive("ack")
        await intake.until(lambda: lost.id not in intake.coordinator.lease_table.open_leases)
        async with SamplerPeer.join(intake.address, leases=(lost.id,)) as back:
            assert list((await back.receive("welcome")).void_leases) == [lost.id]
            for _ in range(2):
                await back.send_chain(lost.id, tree=1)
                assert not (await back.receive("ack")).refusal
            assert intake.sample("subtrees_duplicate_total") == 1
            await back.set_demand(1)
            assert [(s.lease, s.tree) for s in (await back.receive("lease")).accepted] == [(lost.id, 0), (lost.id, 1)]
        assert balanced(intake)


async def test_a_sampler_that_was_cut_off_keeps_its_lease_if_it_is_back_in_time(tmp_path: Path) -> None:
    async with serving(make_table(), tmp_path) as intake:
        async with SamplerPeer.join(intake.address) as cut_off:
            await cut_off.set_demand(1)
            lease = await cut_off.receive("lease")
        async with SamplerPeer.join(intake.address, leases=(lease.id,)) as back:
            assert not (await back.receive("welcome")).void_leases
            await back.roll_out(lease.id)
            await intake.until(lambda: intake.coordinator.lease_table.train_queue.closed_count == 1)


async def test_a_last_will_is_believed_of_who_is_silent_and_of_nobody_else(tmp_path: Path) -> None:
    timings = replace(short_timings(silence=20.0), will_grace_seconds=0.2)
    async with serve_intake(make_table(), tmp_path, timings) as intake, AsyncExitStack() as stack:
        talks, silent = [
            await stack.enter_async_context(SamplerPeer.join(intake.address, name=name)) for name in ("talks", "hushed")
        ]
        beating = asyncio.create_task(beat(talks))
        for sampler in (talks, silent):
            await sampler.set_demand(1)
            await sampler.receive("lease")
        await intake.until(lambda: _silence(intake, "hushed") > 0.2)
        intake.control.members = {name: Member(name, "sampler", 1, alive=False) for name in ("talks", "hushed")}
        intake.coordinator.sessions.apply_last_wills(intake.control.members.values())
        assert list(intake.coordinator.open_sessions) == ["talks"]
        assert [group.holder for group in intake.coordinator.lease_table.open_leases.values()] == [f"talks/{1:016x}"]
        beating.cancel()


def _silence(intake: IntakeFixture, name: str) -> float:
    return time.monotonic() - intake.coordinator.open_sessions[name].last_heard


async def test_while_the_intake_stands_still_nobody_is_silent(tmp_path: Path) -> None:
    async with serving(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        await sampler.set_demand(1)
        lease = await sampler.receive("lease")
        _stand_still(1.0)
        for _ in range(20):  # whoever looks for silence does so now
            await asyncio.sleep(0)
        beating = asyncio.create_task(beat(sampler))
        await sampler.roll_out(lease.id)
        await intake.until(lambda: intake.coordinator.lease_table.train_queue.closed_count == 1)
        assert intake.sample("leases_ended_total", kind="train", reason="lost") == 0
        beating.cancel()


def _stand_still(seconds: float) -> None:
    """As a stopped process does, gRPC's threads apart."""
    time.sleep(seconds)


async def test_a_sampler_that_drains_gives_its_group_to_another(tmp_path: Path) -> None:
    async with serving(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as drains:
        await drains.set_demand(1)
        lease = await drains.receive("lease")
        await drains.send_chain(lease.id)
        await drains.receive("ack")
        await drains.set_demand(0)
        end = LeaseEnd(lease.id, LeaseEndReason.STOPPED, forgone=4)
        await drains.send_request(lease_end=lease_end_to_pb(end))
        async with SamplerPeer.join(intake.address, name="other") as other:
            await other.set_demand(1)
            assert len((await other.receive("lease")).accepted) == 1
        assert intake.sample("leases_ended_total", kind="train", reason="returned") == 1
        assert intake.sample("budget_forfeited_total", kind="train", currency="tokens") == 0


async def test_a_poisoned_question_is_set_aside_and_listed(tmp_path: Path) -> None:
    limits = BreakerLimits(lone_repeats=-1)  # no other sampler is waited for
    async with (
        serving(make_table(total=1), tmp_path, breaker_limits=limits) as intake,
        SamplerPeer.join(intake.address) as sampler,
    ):
        await sampler.set_demand(1)
        asked: list[str] = []
        for _ in range(3):
            lease = await sampler.receive("lease")
            asked.append(lease.question.id)
            await sampler.fail(lease.id, "KeyError: 'title'")
        assert len(set(asked)) == 1
        lease = await sampler.receive("lease")
        assert lease.question.id != asked[0], "the run needs another one in its place"
        await sampler.roll_out(lease.id)
        await intake.until(lambda: intake.coordinator.lease_table.train_queue.closed_count == 1)
        assert intake.sample("groups_set_aside_total", kind="train", reason="failed") == 1
        (row,) = [json.loads(line) for line in (tmp_path / "set_aside.jsonl").read_text(encoding="utf-8").splitlines()]
        assert row | {"lease": "", "time": 0.0} == {
            "kind": "set_aside", "time": 0.0, "lease": "",
            "draw": 0, "question": asked[0], "tries": 3, "leaves": 0, "why": "failed", "error": "KeyError: 'title'"
        }  # fmt: skip
        assert balanced(intake)


async def test_a_sampler_that_is_gone_after_a_restart_costs_no_attempt(tmp_path: Path) -> None:
    async with serving(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address, name="gone") as gone:
        await gone.set_demand(1)
        lease = await gone.receive("lease")
        await gone.send_chain(lease.id)
        await gone.receive("ack")
    async with serving(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address, name="other") as other:
        beating = asyncio.create_task(beat(other))
        await intake.until(lambda: lease.id not in intake.coordinator.lease_table.open_leases)
        await other.set_demand(1)
        again = await other.receive("lease")
        assert [s.lease for s in again.accepted] == [lease.id]
        assert intake.coordinator.lease_table.open_leases[again.id].attempts == 0
        assert intake.sample("leases_ended_total", kind="train", reason="interrupted") == 1
        assert balanced(intake)
        beating.cancel()


async def test_a_batch_waits_a_while_for_a_group_that_may_not_be_overtaken(tmp_path: Path) -> None:
    """It is told to stop, trains on what it has when it does not answer, and its cost is known in the end all the same."""
    async with (
        serve_intake(make_table(batch=1, max_lag=1), tmp_path, short_timings(), long_poll_seconds=2.0) as intake,
        SamplerPeer.join(intake.address) as sampler,
    ):
        beating = asyncio.create_task(beat(sampler))
        await sampler.set_demand(9)
        slow, fast = [await sampler.receive("lease") for _ in range(2)]
        await sampler.send_chain(slow.id)
        await sampler.receive("ack")
        await sampler.roll_out(fast.id)
        assert len((await intake.trainer.handle_take(0, 1)).groups) == 1
        intake.publish(1, 1)
        third = await sampler.receive("lease")
        assert PolicyVersion(1, 1) == PolicyVersion(third.min_version.lineage, third.min_version.step)
        await sampler.roll_out(third.id)
        assert (await sampler.receive("stop_expanding")).lease == slow.id
        assert len((await intake.trainer.handle_take(1, 1)).groups) == 1
        assert [group.draw for group in intake.coordinator.lease_table.train_queue.groups_from(0, 9)] == [1, 0]
        assert intake.sample("groups_closed_total", kind="train", reason="overdue") == 1
        assert intake.sample("rollout_forgone_expansions_total", kind="train") == 3 * (PLAN.leaves - PLAN.trees)
        await sampler.send_chain(slow.id, tree=1)
        assert "reached the staleness bound" in (await sampler.receive("ack")).refusal
        assert intake.sample("rollout_leaves_dropped_total", reason="overdue") == 1
        end = replace(complete(slow.id), reason=LeaseEndReason.STOPPED)
        await sampler.send_request(lease_end=lease_end_to_pb(end))
        await intake.until(lambda: slow.id not in intake.coordinator.lease_table.open_leases)
        assert intake.sample("budget_spent_total", kind="train", currency="tokens") == 4 * 28, "what came too late was computed"
        assert balanced(intake)
        beating.cancel()


async def test_a_trainer_that_is_slow_makes_nobody_grow(tmp_path: Path) -> None:
    """Eight samplers that want 20 leases each, a trainer that takes nothing: what is on its way stays within the bound."""
    table = make_table(questions=50, batch=3, max_lag=1, total=300)
    async with serving(table, tmp_path) as intake, AsyncExitStack() as stack:
        samplers = [await stack.enter_async_context(SamplerPeer.join(intake.address, name=f"s{n}")) for n in range(8)]
        most = 0

        async def work(sampler: SamplerPeer) -> None:
            nonlocal most
            await sampler.set_demand(20)
            while True:
                lease = await sampler.receive("lease")
                most = max(most, table.count_active_leases(LeaseKind.TRAIN) + table.train_queue.untrained_count)
                await sampler.roll_out(lease.id)

        working = [asyncio.create_task(task(sampler)) for sampler in samplers for task in (beat, work)]
        for step in range(3):
            await intake.until(lambda: len(table.train_queue.ready_groups) == table.max_groups_in_flight)
            assert (most, table.count_active_leases(LeaseKind.TRAIN), table.next_lease()) == (6, 0, None)
            assert all(peer.outbox.qsize() == 0 for peer in intake.coordinator.open_sessions.values())
            assert len((await intake.trainer.handle_take(3 * step, 3)).groups) == 3
            intake.publish(step + 1, 3 * step + 3)
        for task in working:
            task.cancel()


async def test_a_sampler_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async with serving(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        await sampler.receive("welcome")
        peer = intake.coordinator.open_sessions["s1"]
        for number in range(peer.max_queued):
            peer.outbox.put_nowait(pb.RolloutResponse(ack=pb.Ack(lease="a", tree=0, index=number)))
        peer.send_response(pb.RolloutResponse(drain=pb.Drain()))
        with pytest.raises(grpc.aio.AioRpcError, match="messages unread"):
            await sampler.receive("drain")
