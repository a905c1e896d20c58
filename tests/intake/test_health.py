"""Readiness and liveness, as gRPC's health service says them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.intake.process_harness import IntakeProcess
from tests.intake.test_service import publish, take

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def stub(channel: grpc.aio.Channel) -> Any:
    return cast("Any", health_pb2_grpc).HealthStub(channel)


async def first_answer(address: str) -> int:
    """The first that health ever says; until somebody listens there is none."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        return (await stub(channel).Check(request, wait_for_ready=True, timeout=30)).status


async def test_health_is_serving_after_recovery_until_the_drain(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.set_demand(3)
        leases = [await peers.sampler.receive("lease") for _ in range(3)]
        for lease in leases[:2]:
            await peers.sampler.roll_out(lease.id)
        assert len(await take(peers.trainer, 0)) == 2
        peers.process.kill()
        await peers.process.wait()
    process = await intake.start()
    try:
        assert await first_answer(intake.listen) == SERVING
        async with intake.trainer() as trainer, grpc.aio.insecure_channel(intake.listen) as channel:
            assert await take(trainer, 0) == ["0000000", "0000001"], "all of the journal has been read by then"
            watching = stub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == SERVING
            process.terminate()
            assert (await asyncio.wait_for(watching.read(), 10)).status == NOT_SERVING
            assert process.returncode is None, "a lease is out: it waits for it"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_an_intake_that_cannot_recover_never_serves(intake: IntakeProcess) -> None:
    journal = intake.run_dir / "journal"
    journal.mkdir(parents=True)
    (journal / "00000002.log").write_bytes(b"a segment whose predecessor is gone")
    process = await intake.start()
    asking = asyncio.create_task(first_answer(intake.listen))
    assert await asyncio.wait_for(process.wait(), 30) == 2
    assert not asking.done()
    asking.cancel()
