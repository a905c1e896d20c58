"""A sampler in wrong hands: it has a certificate, and harms its own leases alone. Over gRPC, with a real journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import msgpack
import pytest

from learner.intake.rpc import slow_client_timeouts
from learner.intake.rpc.slow_client_timeouts import CallLimits
from services.sampler.learner_link.channel import OPTIONS
from tests.intake.builders import PLAN, VERSION, chain, complete, make_table
from tests.intake.process_harness import SamplerPeer
from tests.intake.server_harness import IntakeFixture, serve_intake
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import LeaseKind
from treegrpo.net.limits import MESSAGE_BYTES
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc, weights_pb2, weights_pb2_grpc
from treegrpo.v1.tree_pb2 import PolicyVersion
from treegrpo.wire.codec import lease_end_to_pb, subtree_to_pb, version_to_pb
from treegrpo.wire.size_limits import TIMES

SECONDS = 20.0


async def granted(sampler: SamplerPeer) -> str:
    await sampler.set_demand(1)
    return (await sampler.receive("lease")).id


async def ended(sampler: SamplerPeer) -> tuple[grpc.StatusCode, str]:
    """How the learner ends its stream."""
    async with asyncio.timeout(SECONDS):
        return await sampler.call.code(), await sampler.call.details()


def refused(intake: IntakeFixture, reason: str) -> float:
    return intake.sample("subtrees_refused_total", reason=reason)


# ---- whose lease it is


async def test_a_subtree_sent_again_is_counted_once(tmp_path: Path) -> None:
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        lease = await granted(sampler)
        for _ in range(3):
            await sampler.send_chain(lease)
            assert not (await sampler.receive("ack")).refusal
        assert intake.sample("subtrees_duplicate_total") == 2
        assert intake.coordinator.lease_table.ledger.accounts[LeaseKind.TRAIN].spent == Budget(28, 2)


async def test_nobody_brings_subtrees_of_another_samplers_lease(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither what the other has sent before nor anything new; and the other notices nothing."""
    async with (
        serve_intake(make_table(), tmp_path) as intake,
        SamplerPeer.join(intake.address, name="mine") as mine,
        SamplerPeer.join(intake.address, name="other") as other,
    ):
        lease = await granted(mine)
        await mine.send_chain(lease)
        await mine.receive("ack")
        shapes: list[dict[str, Any]] = [{}, {"index": 1, "parent": 1}, {"tree": 1}]
        for shape in shapes * 2:
            await other.send_request(subtree=subtree_to_pb(chain(lease, reward=9.0, **shape)))
            assert "only its own sampler may send for it" in (await other.receive("ack")).refusal
        assert refused(intake, "holder") == 6
        assert sum("may send for it" in record.getMessage() for record in caplog.records) == 1
        group = intake.coordinator.lease_table.open_leases[lease]
        assert (len(group.encoded), group.stop_requested_at, group.rejected) == (1, None, {})
        await mine.send_chain(lease, tree=1)
        assert not (await mine.receive("ack")).refusal


async def test_nobody_ends_another_samplers_lease(tmp_path: Path) -> None:
    async with (
        serve_intake(make_table(), tmp_path) as intake,
        SamplerPeer.join(intake.address, name="mine") as mine,
        SamplerPeer.join(intake.address, name="other") as other,
    ):
        lease = await granted(mine)
        await other.send_request(lease_end=lease_end_to_pb(complete(lease)))
        assert await granted(other) != lease
        assert lease in intake.coordinator.lease_table.open_leases


async def test_a_lease_that_ended_takes_nothing_more(tmp_path: Path) -> None:
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        lease = await granted(sampler)
        await sampler.roll_out(lease)
        await sampler.receive("lease")
        shapes: list[dict[str, Any]] = [{}, {"tree": 1}]
        for shape in shapes:
            await sampler.send_chain(lease, **shape)
            assert (await sampler.receive("ack")).refusal == f"Lease {lease} is not open; its subtrees are refused."
        assert refused(intake, "lease") == 2
        assert intake.coordinator.lease_table.ledger.accounts[LeaseKind.TRAIN].spent == Budget(28, 2)


# ---- what it says


WRONG: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "a long id": (lambda _: {"subtree": subtree_to_pb(chain("x" * 100))}, "id of a lease has 100 characters"),
    "a long id that ends": (lambda _: {"lease_end": lease_end_to_pb(complete("x" * 100))}, "id of a lease has 100 characters"),
    "a second hello": (lambda _: {"hello": pb.Hello(sampler="s1", engine="fake")}, "sent hello in the middle"),
    "no reason": (lambda lease: {"lease_end": pb.LeaseEnd(lease=lease, reason=cast("Any", 99))}, "ended for reason 99"),
    "no cost": (
        lambda lease: {"lease_end": lease_end_to_pb(replace(complete(lease), unaccounted=Cost(prefilled=2**63)))},
        "which its plan cannot cost",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_breaks_the_contract_ends_the_stream_and_is_counted(tmp_path: Path, name: str) -> None:
    says, sentence = WRONG[name]
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        lease = await granted(sampler)
        await sampler.send_request(**says(lease))
        code, said = await ended(sampler)
        assert (code, sentence in said) == (grpc.StatusCode.INVALID_ARGUMENT, True), said
        assert intake.sample("peers_refused_total", reason="message") == 1
        assert lease in intake.coordinator.lease_table.open_leases


async def test_bytes_that_are_no_message_end_the_stream_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_intake(make_table(), tmp_path) as intake, grpc.aio.insecure_channel(intake.address) as channel:
        for _ in range(3):
            call = cast("Any", channel).stream_stream("/treegrpo.v1.RolloutService/Rollout")()
            await call.write(b"\xff\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert intake.sample("peers_refused_total", reason="message") == 3
    assert [record.exc_info for record in caplog.records if record.levelname != "INFO"] == [None]


async def test_a_step_with_an_impossible_cost_is_refused(tmp_path: Path) -> None:
    """Two of them were more than 64 bits, which neither journal nor snapshot can write."""
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        lease = await granted(sampler)
        sent = subtree_to_pb(chain(lease))
        for number, field in enumerate(("prefilled", "cached", "decoded", "tool_calls", "seconds")):
            bad = pb.RolloutRequest(subtree=sent)
            bad.subtree.tree = number % 2
            bad.subtree.index = number // 2
            huge: Any = float("nan") if field == "seconds" else 2**32 - 1
            setattr(bad.subtree.steps[0].cost, field, huge)
            await sampler.call.write(bad)
            assert "which no step of its plan can cost" in (await sampler.receive("ack")).refusal
        await sampler.send_request(lease_end=lease_end_to_pb(complete(lease)))
        await sampler.receive("lease")
        spent = intake.coordinator.lease_table.ledger.accounts[LeaseKind.TRAIN].spent
        assert spent.tokens <= 10 * TIMES * PLAN.max_context
        assert msgpack.packb(intake.coordinator.lease_table.snapshot_table())


async def test_refusals_of_one_lease_are_bounded(tmp_path: Path) -> None:
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        lease = await granted(sampler)
        for number in range(50):
            await sampler.send_chain(lease, tree=2 + number)
            await sampler.receive("ack")
        assert len(intake.coordinator.lease_table.open_leases[lease].rejected) == PLAN.leaves
        assert refused(intake, "tree") == PLAN.leaves


# ---- how slowly it says it, and how it hears


async def test_half_a_message_is_no_sign_of_life(tmp_path: Path) -> None:
    """A unary call whose message never comes; gRPC would wait for ever."""
    short = CallLimits(request_seconds=0.2)
    async with (
        serve_intake(make_table(), tmp_path, call_limits=short) as intake,
        grpc.aio.insecure_channel(intake.address) as channel,
    ):
        for method in ("DescribeWeights", "FetchWeights"):
            call = cast("Any", channel).stream_stream(f"/treegrpo.v1.WeightsService/{method}")()
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert intake.sample("peers_refused_total", reason="slow") == 2


async def test_who_asks_for_weights_and_does_not_read_them_is_hung_up_on(tmp_path: Path) -> None:
    short = CallLimits(response_seconds=0.3)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(bytes(64 << 20))
    async with (
        serve_intake(make_table(), tmp_path, call_limits=short) as intake,
        grpc.aio.insecure_channel(intake.address) as channel,
    ):
        await intake.versions.publish_version(VERSION, tmp_path / "weights", 0)
        ask = weights_pb2.FetchWeightsRequest(version=version_to_pb(VERSION), name="model.safetensors")
        call = cast("Any", weights_pb2_grpc.WeightsServiceStub(channel)).FetchWeights(ask)
        await intake.until(lambda: intake.sample("peers_refused_total", reason="slow") == 1)
        with suppress(grpc.aio.AioRpcError):
            while await call.read() != slow_client_timeouts.EOF:
                pass
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": "x" * 1000}, grpc.StatusCode.NOT_FOUND),
        ({"name": "../model.safetensors"}, grpc.StatusCode.NOT_FOUND),
        ({"offset": 5}, grpc.StatusCode.OUT_OF_RANGE),
        ({"offset": 2**64 - 1}, grpc.StatusCode.OUT_OF_RANGE),
        ({"version": PolicyVersion(lineage=7)}, grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_weights_that_are_not_there_are_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any], code: grpc.StatusCode
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(bytes(4))
    async with serve_intake(make_table(), tmp_path) as intake, grpc.aio.insecure_channel(intake.address) as channel:
        await intake.versions.publish_version(VERSION, tmp_path / "weights", 0)
        asked: dict[str, Any] = {"version": version_to_pb(VERSION), "name": "model.safetensors", **changes}
        ask = weights_pb2.FetchWeightsRequest(**asked)
        call = cast("Any", weights_pb2_grpc.WeightsServiceStub(channel)).FetchWeights(ask)
        assert await call.code() is code
        assert len(await call.details()) < 200


# ---- how much it says


async def test_metadata_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    async with serve_intake(make_table(), tmp_path) as intake, grpc.aio.insecure_channel(intake.address) as channel:
        call = cast("Any", channel).stream_stream("/treegrpo.v1.RolloutService/Rollout")(metadata=(("x", "y" * 20_000),))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "metadata size exceeds" in await call.details()


async def test_a_message_beyond_the_limit_is_refused_and_its_lease_goes_on(tmp_path: Path) -> None:
    options = [(key, value) for key, value in OPTIONS if "message_length" not in key]
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as good:
        async with grpc.aio.insecure_channel(intake.address, options=options) as channel:
            call = cast("Any", channel).stream_stream("/treegrpo.v1.RolloutService/Rollout")()
            await call.write(bytes(MESSAGE_BYTES + 1))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await granted(good)


# ---- how a stream ends


async def test_a_stream_that_ends_while_it_is_written_to_comes_to_its_end(tmp_path: Path) -> None:
    """gRPC cannot say goodbye behind half a message; the handler died of it, and the sampler waited for ever."""
    async with serve_intake(make_table(), tmp_path) as intake, grpc.aio.insecure_channel(intake.address) as channel:
        for _ in range(50):
            call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
            await call.write(pb.RolloutRequest(hello=pb.Hello(sampler="s1", incarnation=1, engine="fake")))
            await call.write(pb.RolloutRequest(demand=pb.Demand(leases=4)))
            await call.done_writing()
            async with asyncio.timeout(SECONDS):
                while await call.read() != slow_client_timeouts.EOF:
                    pass
                assert await call.code() is grpc.StatusCode.OK
