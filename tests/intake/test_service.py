"""The intake as a process: real gRPC, a real broker, the real local socket."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.intake.process_harness import IntakeProcess, IntakeWithPeers, SamplerPeer
from treegrpo.errors import ContractError
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT
from treegrpo.v1 import rollout_pb2, weights_pb2, weights_pb2_grpc
from treegrpo.wire.control import ControlPlane, Member, RunState, publish_state
from treegrpo.wire.trainer_protocol import (
    Covered,
    Done,
    Evaluate,
    Evaluation,
    IntakeConnection,
    Publish,
    StepReport,
    Take,
    Taken,
    unpack_group,
)


def version_directory(intake: IntakeProcess, step: int) -> Path:
    directory = intake.run_dir / "weights" / f"1.{step}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (directory / "config.json").write_text("{}", encoding="utf-8")
    return directory


async def publish(intake: IntakeProcess, trainer: IntakeConnection, step: int, position: int) -> None:
    request = Publish(f"1.{step}", str(version_directory(intake, step)), position)
    await asyncio.to_thread(trainer.ask, request, Done)


async def take(trainer: IntakeConnection, position: int, count: int = 2) -> list[str]:
    taken = await asyncio.to_thread(trainer.ask, Take(position, count), Taken)
    return [unpack_group(group).id for group in taken.groups]


async def test_a_question_goes_out_as_a_lease_and_comes_back_as_a_group(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        sampler, trainer = peers.sampler, peers.trainer
        assert (await sampler.receive("welcome")).plan.trees == 2
        await sampler.set_demand(3)
        await publish(intake, trainer, 0, 0)
        leases = [await sampler.receive("lease") for _ in range(3)]
        assert len({lease.question.id for lease in leases}) == 3
        for lease in leases[:2]:
            await sampler.roll_out(lease.id)
        assert await take(trainer, 0) == ["0000000", "0000001"]
        assert await take(trainer, 0) == ["0000000", "0000001"], "a trainer that starts again gets them again"
        samples = await intake.samples()
        assert samples["treegrpo_budget_spent_total/tokens/train"] == 2 * 28
        assert samples["treegrpo_leases_outstanding/train"] == 2


async def test_a_subtree_sent_again_is_acked_and_counted_once(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        sampler, trainer = peers.sampler, peers.trainer
        await publish(intake, trainer, 0, 0)
        await sampler.receive("welcome")
        await sampler.set_demand(1)
        lease = await sampler.receive("lease")
        for _ in range(2):
            await sampler.send_chain(lease.id)
            await sampler.receive("ack")
        await sampler.send_chain("train-9999999")
        await sampler.receive("ack")
        samples = await intake.samples()
        assert samples["treegrpo_subtrees_duplicate_total"] == 1
        assert samples["treegrpo_subtrees_refused_total/lease"] == 1
        assert samples["treegrpo_budget_spent_total/tokens/train"] == 28


async def test_a_killed_intake_resumes_with_every_acked_group(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        process, sampler, trainer = peers.process, peers.sampler, peers.trainer
        await publish(intake, trainer, 0, 0)
        await sampler.receive("welcome")
        await sampler.set_demand(3)
        done, also_done, open_ = [await sampler.receive("lease") for _ in range(3)]
        await sampler.roll_out(done.id)
        await sampler.roll_out(also_done.id)
        await sampler.send_chain(open_.id)
        await sampler.receive("lease")
        await sampler.receive("ack")
        assert await take(trainer, 0) == ["0000000", "0000001"]
        process.kill()
        await process.wait()
    async with intake.with_peers(leases=(open_.id,)) as peers:
        sampler, trainer = peers.sampler, peers.trainer
        assert not (await sampler.receive("welcome")).void_leases, "who comes back goes on"
        assert await take(trainer, 0) == ["0000000", "0000001"]
        await publish(intake, trainer, 1, 2)
        await sampler.send_chain(open_.id)
        await sampler.send_chain(open_.id, tree=1)
        for _ in range(2):
            assert not (await sampler.receive("ack")).refusal
        samples = await intake.samples()
        assert samples["treegrpo_subtrees_duplicate_total"] == 1
        assert samples["treegrpo_budget_spent_total/tokens/train"] == 4 * 28
        parts = ("spent", "refunded", "forfeited")
        became = sum(samples[f"treegrpo_budget_{part}_total/tokens/train"] for part in parts)
        outstanding = samples["treegrpo_budget_outstanding/tokens/train"]
        assert samples["treegrpo_budget_granted_total/tokens/train"] == became + outstanding


async def test_a_restarted_sampler_gets_the_questions_it_held_before(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.set_demand(4)
        before = [(await peers.sampler.receive("lease")).question.id for _ in range(4)]
        async with SamplerPeer.join(intake.listen, incarnation=2) as again:
            await again.set_demand(4)
            assert [(await again.receive("lease")).question.id for _ in range(4)] == before
        assert (await intake.samples())["treegrpo_leases_ended_total/train/lost"] == 4


async def test_a_stop_sent_to_a_broken_stream_is_sent_again(intake: IntakeProcess) -> None:
    async with intake.serving(), intake.trainer() as trainer:
        async with SamplerPeer.join(intake.listen) as sampler:
            await publish(intake, trainer, 0, 0)
            await sampler.set_demand(4)
            slow, *others = [await sampler.receive("lease") for _ in range(4)]
            for lease in others[:2]:
                await sampler.roll_out(lease.id)
            assert len(await take(trainer, 0)) == 2
            await publish(intake, trainer, 1, 2)
            for lease in (others[2], await sampler.receive("lease")):
                await sampler.roll_out(lease.id)
            assert (await sampler.receive("stop_expanding")).lease == slow.id
        async with SamplerPeer.join(intake.listen, leases=(slow.id,)) as sampler:
            assert (await sampler.receive("stop_expanding")).lease == slow.id


async def test_a_run_without_progress_ends_with_an_error(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.set_demand(1)
        for _ in range(64):
            lease = await peers.sampler.receive("lease")
            await peers.sampler.fail(lease.id, "ToolError: the retriever is not there")
        _, errors = await asyncio.wait_for(peers.process.communicate(), 30)
        assert peers.process.returncode == 2
        last = errors.decode().strip().splitlines()[-1]
        assert last.startswith(
            "error: The last 64 leases, of sampler s1, finished no episode; sampler s1 says: “ToolError: the retriever"
        )


async def train(intake: IntakeProcess, peers: IntakeWithPeers, step: int) -> list[str]:
    """Roll out a batch, train it, and write a checkpoint; the groups' names."""
    for lease in [await peers.sampler.receive("lease") for _ in range(2)]:
        await peers.sampler.roll_out(lease.id)
    taken = await take(peers.trainer, 2 * step)
    await publish(intake, peers.trainer, step + 1, 2 * step + 2)
    await asyncio.to_thread(peers.trainer.ask, Covered(2 * step + 2), Done)
    return taken


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask the intake from outside until it is so: nothing tells of a file or a metric."""
    async with asyncio.timeout(10):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def there(path: Path) -> None:
    await until(lambda: asyncio.to_thread(path.exists))


async def test_groups_covered_by_two_checkpoints_are_deleted(intake: IntakeProcess) -> None:
    journal, snapshots = intake.run_dir / "journal", intake.run_dir / "snapshots"
    async with intake.with_peers("--train.max_lag", "5") as peers:
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.receive("welcome")
        await peers.sampler.set_demand(2)
        taken: list[str] = []
        for step in range(3):
            taken = await train(intake, peers, step)
            await there(snapshots / f"{step + 2:08d}")
            assert await take(peers.trainer, 2 * step) == taken, "a damaged checkpoint leaves the one before"
        with pytest.raises(ContractError, match="resume from the checkpoint at position 4 or later"):
            await take(peers.trainer, 1)
        await until(lambda: asyncio.to_thread(lambda: not (journal / "00000002.log").exists()))
        peers.process.kill()
        await peers.process.wait()
    assert sorted(path.name for path in snapshots.iterdir()) == ["00000003", "00000004"]
    assert sorted(path.name for path in journal.glob("*.log")) == ["00000003.log", "00000004.log"]
    async with intake.with_peers("--train.max_lag", "5") as peers:
        assert await take(peers.trainer, 4) == taken
        samples = await intake.samples()
        assert samples["treegrpo_budget_spent_total/tokens/train"] == 6 * 28
        assert samples["treegrpo_groups_closed_total/train/complete"] == 6, "counters go on where they were"


async def test_a_full_disk_blocks_every_peer_and_ends_none(intake: IntakeProcess) -> None:
    async with intake.with_peers("--train.max_lag", "5") as peers:
        sampler, trainer, pid = peers.sampler, peers.trainer, peers.process.pid
        await publish(intake, trainer, 0, 0)
        await sampler.receive("welcome")
        await sampler.set_demand(3)
        leases = [await sampler.receive("lease") for _ in range(3)]
        for lease in leases[:2]:
            await sampler.roll_out(lease.id)
        assert len(await take(trainer, 0)) == 2
        size = (intake.run_dir / "journal" / "00000001.log").stat().st_size
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        await sampler.send_chain(leases[2].id)

        async def blocked() -> bool:
            return (await intake.samples())["treegrpo_journal_blocked"] == 1

        await until(blocked)
        out = (await intake.samples())["treegrpo_leases_outstanding/train"]
        await sampler.set_demand(9)
        assert await take(trainer, 0) == ["0000000", "0000001"], "what is durable is trained on"
        await asyncio.to_thread(trainer.ask, StepReport({"step": 1}), Done)
        samples = await intake.samples()
        assert samples["treegrpo_journal_bytes"] == size, "nothing partial stays"
        assert samples["treegrpo_leases_outstanding/train"] == out, "nothing is granted"
        hearing = asyncio.create_task(sampler.receive("ack"))
        assert not (await asyncio.wait({hearing}, timeout=0.3))[0], "nothing is acked"
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        assert (await hearing).lease == leases[2].id
        await sampler.receive("lease")
        assert (await intake.samples())["treegrpo_journal_blocked"] == 0
        peers.process.kill()
        await peers.process.wait()
    async with intake.with_peers():
        assert (await intake.samples())["treegrpo_budget_spent_total/tokens/train"] == 3 * 28


async def test_an_evaluation_goes_on_where_a_killed_intake_left_it(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.receive("welcome")
        asked = asyncio.create_task(asyncio.to_thread(peers.trainer.ask, Evaluate("1.0"), Evaluation))
        await peers.sampler.set_demand(1)
        await peers.sampler.roll_out((await evaluation_lease(peers.sampler)).id, reward=1.0)
        await peers.sampler.send_chain((await evaluation_lease(peers.sampler)).id, fails=True)
        await peers.sampler.receive("ack")
        peers.process.kill()
        await peers.process.wait()
        with pytest.raises(ConnectionError):
            await asked
    async with intake.with_peers() as peers:
        await asyncio.to_thread(peers.trainer.ask, Publish("1.0", str(intake.run_dir / "weights" / "1.0"), 0), Done)
        asked = asyncio.create_task(asyncio.to_thread(evaluated, peers.trainer))
        await peers.sampler.set_demand(9)
        for _ in range(2):
            await peers.sampler.roll_out((await evaluation_lease(peers.sampler)).id, reward=0.0)
        result = await asked
        assert result.questions == 3
        assert result.em == pytest.approx(1 / 3)


async def evaluation_lease(sampler: SamplerPeer) -> Any:
    """The next lease of an evaluation, which the trainer asks for meanwhile; training leases that come first are done."""
    while (lease := await sampler.receive("lease")).kind != rollout_pb2.LEASE_KIND_EVAL:
        await sampler.roll_out(lease.id)
    return lease


def evaluated(trainer: IntakeConnection) -> Evaluation:
    while not (result := trainer.ask(Evaluate("1.0"), Evaluation)).done:
        pass
    return result


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.DRAINING])
async def test_a_pause_outlives_a_restart_of_the_intake_and_a_drain_does_not(intake: IntakeProcess, state: RunState) -> None:
    await publish_state(intake.broker, intake.name, state)
    watcher = Member("watcher", "sampler", 1)
    async with intake.serving(), ControlPlane.connect(intake.broker, intake.name, watcher) as control:
        await control.wait_retained_state()
        assert control.state is (RunState.PAUSED if state is RunState.PAUSED else RunState.RUNNING)


async def test_evaluation_is_every_heldout_question_once(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        sampler, trainer = peers.sampler, peers.trainer
        await publish(intake, trainer, 0, 0)
        await sampler.receive("welcome")
        asked = asyncio.create_task(asyncio.to_thread(trainer.ask, Evaluate("1.0"), Evaluation))
        await sampler.set_demand(3)
        first = await sampler.receive("lease")
        leases = [first, *[await sampler.receive("lease") for _ in range(2)]]
        if any(lease.kind != 2 for lease in leases):  # demand came before the evaluation
            await sampler.set_demand(6)
            leases = [lease for lease in [*leases, *[await sampler.receive("lease") for _ in range(3)]] if lease.kind == 2]
        for lease, reward in zip(leases, (1.0, 0.0, 0.0), strict=True):
            await sampler.roll_out(lease.id, reward)
        result = await asked
        assert (result.done, result.questions, result.failed) == (True, 3, 0)
        assert result.em == pytest.approx(1 / 3)
        await asyncio.to_thread(trainer.ask, StepReport({"step": 1, "reward": 0.5}), Done)
        lines = [json.loads(line) for line in (intake.run_dir / "progress.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["kind"] for line in lines] == ["eval", "step"]
        assert lines[1]["ledger"]["eval"]["tokens"]["spent"] == 3 * 28


async def test_weights_arrive_whole_and_from_any_offset(intake: IntakeProcess) -> None:
    async with (
        intake.serving(),
        grpc.aio.insecure_channel(intake.listen) as channel,
        intake.trainer() as trainer,
    ):
        await publish(intake, trainer, 0, 0)
        stub = weights_pb2_grpc.WeightsServiceStub(channel)
        described = await stub.DescribeWeights(weights_pb2.DescribeWeightsRequest())
        (file,) = [f for f in described.files if f.name == "model.safetensors"]
        request = weights_pb2.FetchWeightsRequest(version=described.version, name=file.name)
        data = b"".join([chunk.data async for chunk in stub.FetchWeights(request)])
        assert (len(data), hashlib.sha256(data).digest()) == (file.bytes, file.sha256)
        request.offset = 2_000_000
        assert b"".join([chunk.data async for chunk in stub.FetchWeights(request)]) == data[2_000_000:]
        request.name = "../journal"
        with pytest.raises(grpc.aio.AioRpcError, match="has no file"):
            await anext(aiter(stub.FetchWeights(request)))


async def test_sigterm_drains_and_ends_cleanly(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        process, sampler, trainer = peers.process, peers.sampler, peers.trainer
        await publish(intake, trainer, 0, 0)
        await sampler.receive("welcome")
        await sampler.set_demand(1)
        lease = await sampler.receive("lease")
        process.terminate()
        await sampler.receive("drain")
        await sampler.roll_out(lease.id)
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_a_stream_that_does_not_begin_with_hello_is_refused(intake: IntakeProcess) -> None:
    async with intake.serving(), grpc.aio.insecure_channel(intake.listen) as channel:
        call = SamplerPeer(channel.stream_stream("/treegrpo.v1.RolloutService/Rollout")()).call
        await call.write(b"")
        with pytest.raises(grpc.aio.AioRpcError, match="begins with Hello"):
            await call.read()


@pytest.mark.parametrize("case", ["another run", "busy port", "no broker"])
async def test_unusable_settings_are_refused_in_one_sentence(intake: IntakeProcess, case: str) -> None:
    more: list[str] = []
    if case == "another run":
        more = ["--run.seed", "5"]
        async with intake.with_peers() as peers:
            await publish(intake, peers.trainer, 0, 0)
            await peers.sampler.set_demand(1)
            lease = await peers.sampler.receive("lease")
            await peers.sampler.send_chain(lease.id)
            await peers.sampler.receive("ack")
        (intake.run_dir / "weights" / "0.1").mkdir(parents=True)  # a step was made
    elif case == "busy port":
        more = ["--learner.listen", intake.broker]
    else:
        more = ["--broker.address", "127.0.0.1:1"]
    process = await intake.start(*more)
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    last = stderr.decode().strip().splitlines()[-1]
    assert process.returncode == (TRANSIENT if case == "no broker" else FAILED)
    assert last.startswith("error: ")
    assert {"another run": "run.seed was 0 and is 5", "busy port": "learner.listen", "no broker": "127.0.0.1:1"}[case] in last
    assert "Traceback" not in stderr.decode()


async def test_an_untrained_run_may_change_and_its_leases_are_void(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.set_demand(1)
        before = await peers.sampler.receive("lease")
        await peers.sampler.send_chain(before.id)
        await peers.sampler.receive("ack")
    async with intake.with_peers("--rollout.max_turns", "7", leases=(before.id,)) as peers:
        shutil.rmtree(intake.run_dir / "weights")
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.set_demand(1)
        lease = await peers.sampler.receive("lease")
        assert (lease.plan.max_turns, lease.id != before.id) == (7, True)
    assert (intake.run_dir / "journal" / "untrained" / "00000001.log").exists()
    async with intake.with_peers("--rollout.max_turns", "7", leases=(lease.id,)) as peers:  # and goes on as that
        shutil.rmtree(intake.run_dir / "weights")
        await publish(intake, peers.trainer, 0, 0)
        await peers.sampler.set_demand(2)
        assert (await peers.sampler.receive("lease")).id != lease.id


async def test_a_journal_of_an_earlier_version_is_refused(intake: IntakeProcess) -> None:
    (intake.run_dir / "journal").mkdir(parents=True)
    (intake.run_dir / "journal" / "journal.msgpack").write_bytes(b"records")
    process = await intake.start()
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert "is of an earlier version of treegrpo" in stderr.decode().strip().splitlines()[-1]
