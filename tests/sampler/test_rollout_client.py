"""The rollout stream against a real gRPC server: delivery, reconnects, leases in and out, goodbye."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from services.sampler.expansion.expander import Expander
from services.sampler.expansion.stall_monitor import StallMonitor
from services.sampler.learner_link.channel import connect_learner
from services.sampler.learner_link.rollout_client import RolloutClient
from services.sampler.learner_link.weight_store import WeightStore
from services.sampler.learner_link.weight_sync import WeightSync
from services.sampler.lease_worker import LeaseWorker, SamplerIdentity
from tests.sampler.fake_learner import FakeLearner, serving
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, HeldScript, Script, deep, lease, plan, turns
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import PolicyVersion, Step, Subtree
from treegrpo.errors import ContractError, UnavailableError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.security.credentials import OPEN
from treegrpo.v1 import rollout_pb2
from treegrpo.wire.codec import lease_end_from_pb

SECONDS = 10.0


@dataclass
class StreamFixture:
    """A lease worker and both ends of its stream."""

    learner: FakeLearner
    client: RolloutClient
    worker: LeaseWorker
    engine: FakeEngine
    metrics: SamplerMetrics
    streaming: asyncio.Task[None]


@asynccontextmanager
async def streaming_worker(script: Script, learner: FakeLearner | None = None) -> AsyncGenerator[StreamFixture]:
    """A lease worker on a real stream to a fake learner."""
    learner, metrics, engine = learner or FakeLearner(), SamplerMetrics(), FakeEngine(script)
    with TemporaryDirectory() as root:
        async with serving(learner) as channel, asyncio.TaskGroup() as tasks:
            client = RolloutClient(channel, "test", metrics)
            weight_sync = WeightSync(WeightStore(channel, Path(root), metrics), engine, metrics)
            following = tasks.create_task(weight_sync.follow_versions())
            expander = Expander(engine, FakeEnvironment(), FakeText(), retries=0, metrics=metrics)
            me = SamplerIdentity("sampler-0", 7, "fake", 16)
            monitor = StallMonitor(lambda: [weight_sync.wait_reason], lambda: expander.call_timer.last_progress, metrics)
            worker = LeaseWorker(me, engine, expander, weight_sync, client, monitor, metrics, tasks)
            streaming = tasks.create_task(client.run_stream(worker))
            yield StreamFixture(learner, client, worker, engine, metrics, streaming)
            streaming.cancel()
            following.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that tells nobody when it comes true; the test's time limit ends it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def subtree(index: int, name: str = "lease-1") -> Subtree:
    one = np.ones(1, np.uint32)
    return Subtree(name, 0, index, 0, (Step(index + 1, 0, one, np.ones(1, np.float32), one),))


async def test_a_stream_begins_with_hello_and_the_demand_that_fills_the_engine() -> None:
    async with streaming_worker(deep(1)) as fixture:
        hello = await fixture.learner.hellos.get()
        assert (hello.sampler, hello.incarnation, hello.engine, hello.capacity) == ("sampler-0", 7, "fake", 16)
        demand = await fixture.learner.next("demand")
        assert demand.demand.leases == 16 // fixture.learner.plan.width + 1


async def test_a_lease_comes_back_as_subtrees_and_its_end() -> None:
    async with streaming_worker(deep(1)) as fixture:
        await fixture.learner.next("demand")
        one = lease(fixture.learner.plan)
        await fixture.learner.grant(one)
        got = [await fixture.learner.next("subtree") for _ in range(one.plan.leaves)]
        end = await fixture.learner.next("lease_end")
        assert lease_end_from_pb(end.lease_end) == LeaseEnd(one.id, LeaseEndReason.COMPLETE)
        assert fixture.client.unacked == len(got)
        for request in got:
            await fixture.learner.ack(request)
        await fixture.client.wait_delivered()
        assert fixture.metrics.registry.get_sample_value("treegrpo_sampler_unacked_subtrees") == 0


async def test_after_a_broken_stream_exactly_what_was_not_acked_is_sent_again() -> None:
    async with streaming_worker(deep(1)) as fixture:
        await fixture.learner.next("demand")
        for index in range(4):
            await fixture.client.send_subtree(subtree(index))
        fixture.client.send_lease_end(LeaseEnd("lease-1", LeaseEndReason.COMPLETE))
        got = [await fixture.learner.next("subtree") for _ in range(4)]
        await fixture.learner.next("lease_end")
        await fixture.learner.ack(got[0])
        await fixture.learner.ack(got[2])
        await until(lambda: fixture.client.unacked == 2)
        fixture.learner.break_stream()
        assert (await fixture.learner.hellos.get()).leases == []
        assert (await fixture.learner.hellos.get()).leases == ["lease-1"]
        await fixture.learner.next("demand")
        again = [await fixture.learner.next("subtree") for _ in range(2)]
        assert [request.subtree.index for request in again] == [1, 3]
        assert again == [got[1], got[3]]
        await fixture.learner.next("lease_end")
        for request in again:
            await fixture.learner.ack(request)
        await fixture.client.wait_delivered()
        assert fixture.learner.requests.empty()
        assert fixture.metrics.registry.get_sample_value("treegrpo_sampler_reconnects_total") == 1


async def test_a_refused_subtree_is_counted_and_not_sent_again() -> None:
    async with streaming_worker(deep(1)) as fixture:
        await fixture.learner.next("demand")
        for index in range(2):
            await fixture.client.send_subtree(subtree(index))
        refused, kept = [await fixture.learner.next("subtree") for _ in range(2)]
        await fixture.learner.say(ack=rollout_pb2.Ack(lease=refused.subtree.lease, tree=0, index=0, refusal="Group 7: wrong."))
        await until(lambda: fixture.client.unacked == 1)
        assert fixture.metrics.registry.get_sample_value("treegrpo_sampler_errors_total", {"type": "ContractError"}) == 1
        fixture.learner.break_stream()
        await fixture.learner.next("demand")
        assert await fixture.learner.next("subtree") == kept
        assert not fixture.streaming.done()
        await fixture.learner.ack(kept)
        await fixture.client.wait_delivered()


async def test_a_void_lease_is_cancelled_and_finished_subtrees_are_sent_again() -> None:
    stuck = asyncio.Event()

    async def script(prefix: str) -> str:
        if turns(prefix) == 0:
            return "s!"
        stuck.set()
        await asyncio.Event().wait()
        return ""

    async with streaming_worker(script) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(lease(plan(1, 0, 0), name="void"))
        await stuck.wait()
        await fixture.client.send_subtree(subtree(0, "void"))
        await fixture.client.send_subtree(subtree(0, "kept"))
        fixture.client.send_lease_end(LeaseEnd("void", LeaseEndReason.COMPLETE))
        for kind in ("subtree", "subtree", "lease_end"):
            await fixture.learner.next(kind)
        fixture.learner.void = ["void"]
        fixture.learner.break_stream()
        await fixture.learner.hellos.get()
        assert (await fixture.learner.hellos.get()).leases == ["kept", "void"]
        await fixture.worker.wait_drained(SECONDS)
        await fixture.learner.next("demand")
        for name in ("void", "kept"):
            request = await fixture.learner.next("subtree")
            assert request.subtree.lease == name
            await fixture.learner.ack(request)
        await fixture.client.wait_delivered()
        assert fixture.client.leases == set()
        assert fixture.learner.requests.empty()


async def test_a_learner_that_does_not_ack_is_waited_for() -> None:
    """Trees of one leaf; the engine has room for 16 and one lease more is asked for: 17 may wait for their acks."""
    learner = FakeLearner()
    learner.plan = plan(1, 0, 0)
    async with streaming_worker(deep(0), learner) as fixture:
        most = (await fixture.learner.next("demand")).demand.leases
        for number in range(most + 3):
            await fixture.learner.grant(lease(learner.plan, name=f"lease-{number}"))
        sent: list[rollout_pb2.RolloutRequest] = []
        while len(sent) < most:
            if (request := await fixture.learner.requests.get()).HasField("subtree"):
                sent.append(request)
        await until(lambda: fixture.client.unacked == most)
        for _ in range(20):
            await asyncio.sleep(0)
        assert fixture.client.unacked == most
        assert fixture.metrics.registry.get_sample_value("treegrpo_sampler_leases") == 3
        while len(sent) < most + 3:
            await fixture.learner.ack(sent.pop(0))
            most += 1
            while not (request := await fixture.learner.requests.get()).HasField("subtree"):
                pass
            sent.append(request)
            if fixture.metrics.registry.get_sample_value("treegrpo_sampler_leases") == 0:
                break
        await fixture.worker.wait_drained(SECONDS)


async def test_work_goes_on_while_the_learner_is_away() -> None:
    script = HeldScript()
    async with streaming_worker(script) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(lease(plan(1, 0, 0)))
        await script.asked.acquire()
        fixture.learner.break_stream()
        script.release.set()
        await fixture.worker.wait_drained(SECONDS)
        await fixture.learner.next("demand")
        assert (await fixture.learner.next("subtree")).subtree.leaves
        await fixture.learner.next("lease_end")


async def test_stop_expanding_reaches_its_lease_only() -> None:
    script = HeldScript()
    async with streaming_worker(script) as fixture:
        await fixture.learner.next("demand")
        for name in ("stopped", "other"):
            await fixture.learner.grant(lease(plan(1, 1, 1), name=name))
            await script.asked.acquire()
        await fixture.learner.say(stop_expanding=rollout_pb2.StopExpanding(lease="stopped"))
        await fixture.learner.say(stop_expanding=rollout_pb2.StopExpanding(lease="unknown"))
        await fixture.learner.grant(lease(plan(1, 0, 0), name="probe"))
        await script.asked.acquire()  # the stream is in order: what was said before has been heard
        script.release.set()
        ends: dict[str, LeaseEnd] = {}
        while len(ends) < 3:
            request = await fixture.learner.requests.get()
            if request.HasField("lease_end"):
                ends[request.lease_end.lease] = lease_end_from_pb(request.lease_end)
        assert (ends["stopped"].reason, ends["stopped"].forgone) == (LeaseEndReason.STOPPED, 1)
        assert ends["other"].reason is LeaseEndReason.COMPLETE


async def test_draining_delivers_everything_and_closes_the_stream() -> None:
    script = HeldScript()
    async with streaming_worker(script) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(lease(plan(1, 1, 2)))
        await script.asked.acquire()
        await fixture.learner.say(drain=rollout_pb2.Drain())
        assert (await fixture.learner.next("demand")).demand.leases == 0
        script.release.set()
        request = await fixture.learner.next("subtree")
        end = await fixture.learner.next("lease_end")
        assert (end.lease_end.reason, end.lease_end.forgone) == (rollout_pb2.LEASE_END_REASON_STOPPED, 2)
        await fixture.worker.wait_drained(SECONDS)
        await fixture.learner.ack(request)
        await fixture.client.wait_delivered()
        fixture.client.close_stream()
        await fixture.streaming
        assert await fixture.learner.goodbyes.get() == "sampler-0"


async def test_goodbye_is_said_again_when_the_stream_breaks_meanwhile() -> None:
    async with streaming_worker(deep(1)) as fixture:
        await fixture.learner.next("demand")
        fixture.learner.break_stream()
        fixture.client.send_lease_end(LeaseEnd("lease-1", LeaseEndReason.COMPLETE))
        fixture.client.close_stream()
        await fixture.streaming
        kinds: list[str | None] = []
        while not fixture.learner.requests.empty():
            kinds.append(fixture.learner.requests.get_nowait().WhichOneof("kind"))
        assert "lease_end" in kinds
        assert fixture.learner.goodbyes.qsize() == 1


async def test_a_lease_this_sampler_cannot_read_fails_by_itself() -> None:
    async with streaming_worker(deep(1)) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.say(lease=rollout_pb2.Lease(id="strange"))
        end = await fixture.learner.next("lease_end")
        assert end.lease_end.reason == rollout_pb2.LEASE_END_REASON_FAILED
        assert "strange" in end.lease_end.error


async def test_a_lease_waits_for_the_version_it_needs() -> None:
    async with streaming_worker(deep(1)) as fixture:
        await fixture.learner.next("demand")
        needed = PolicyVersion(1, 3)
        await fixture.learner.grant(replace(lease(plan(1, 0, 0), name="waits"), min_version=needed))
        await fixture.learner.grant(lease(plan(1, 0, 0), name="does not"))
        assert (await fixture.learner.next("subtree")).subtree.lease == "does not"
        assert (await fixture.learner.next("lease_end")).lease_end.lease == "does not"
        fixture.learner.versions[needed] = {"model.safetensors": b"new"}
        subtree_of_new = (await fixture.learner.next("subtree")).subtree
        assert subtree_of_new.lease == "waits"
        assert {span.version.step for step in subtree_of_new.steps for span in step.spans} == {3}


async def test_seconds_without_a_lease_are_counted() -> None:
    async with streaming_worker(deep(1)) as fixture:
        await fixture.learner.next("demand")
        fixture.worker.count_idle_seconds()
        idle = fixture.metrics.registry.get_sample_value("treegrpo_sampler_waiting_seconds_total")
        assert idle
        assert idle > 0


async def test_a_learner_that_refuses_is_not_asked_again() -> None:
    learner = FakeLearner()
    learner.refusal = "no such contract"
    with pytest.raises(BaseExceptionGroup) as caught:
        async with streaming_worker(deep(1), learner) as fixture:
            await asyncio.wait({fixture.streaming})
    assert caught.group_contains(ContractError, match="no such contract")


async def test_a_learner_that_is_not_there_is_named() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: nobody answers
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=rf"{address}.*sampler\.learner"):
            await connect_learner(address, OPEN, 0.2)
