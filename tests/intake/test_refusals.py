"""What the intake does with subtrees that cannot be trained on: none is lost with another, and none stops the run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.lease_events import replay_event
from tests.intake.builders import PLAN, accept, chain, complete, grant, make_table
from tests.intake.process_harness import IntakeProcess, SamplerPeer
from tests.intake.server_harness import serve_intake
from tests.intake.test_service import publish
from tests.shared.invalid_subtrees import EVERY
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseEndReason, LeaseKind
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import TreeError
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.storage.model_config import read_model_config
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.codec import lease_end_to_pb, lease_to_pb, subtree_to_pb
from treegrpo.wire.trainer_protocol import Take, Taken, unpack_group


@pytest.mark.parametrize("name", EVERY)
def test_the_book_refuses_it_and_changes_nothing(name: str) -> None:
    table, broken = make_table(), EVERY[name]
    lease = grant(table)
    accept(table, chain(lease))
    spent = table.ledger.accounts[LeaseKind.TRAIN].spent
    with pytest.raises(TreeError) as refusal:
        accept(table, broken.of(lease))
    assert str(refusal.value).startswith(f"Group 0000000, tree {broken.says}")
    assert refusal.value.field == broken.field
    assert table.ledger.accounts[LeaseKind.TRAIN].spent == spent
    assert accept(table, chain(lease, index=1, parent=1))


def test_a_tree_that_is_not_in_the_plan_is_refused() -> None:
    table = make_table()
    with pytest.raises(TreeError, match=r"^Group 0000000: tree 2 is not one of its plan's 2") as refusal:
        accept(table, chain(grant(table), tree=PLAN.trees))
    assert refusal.value.field == "tree"


@pytest.mark.parametrize("name", EVERY)
def test_a_journal_that_has_it_keeps_every_position(name: str, tmp_path: Path) -> None:
    """A version before this one may have accepted it: what came later must not move up, or a trainer would skip a group."""
    first, records = make_table(), list[dict[str, object]]()
    for subtrees in ([EVERY[name].of], [chain]):
        work = first.next_lease()
        assert work is not None
        lease, draw = work
        first.grant_lease(lease, draw, "s1", 0.0)
        records.append({"event": "granted", "lease": lease_to_pb(lease).SerializeToString(), "draw": draw, "holder": ""})
        for subtree in (chain(lease.id), *(make(lease.id) for make in subtrees)):
            records.append({"event": "accepted", "subtree": subtree_to_pb(subtree).SerializeToString()})
        records.append({"event": "ended", "end": lease_end_to_pb(complete(lease.id)).SerializeToString()})
    again = make_table()
    recorder = RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=1)
    for record in [*records, {"event": "taken", "draws": [0, 1], "stale": []}]:
        replay_event(again, recorder, record)
    assert [group.group.id for group in again.train_queue.groups_from(0, 2)] == ["0000000", "0000001"]
    assert [len(group.encoded) for group in again.train_queue.groups_from(0, 2)] == [2, 1]
    assert again.ledger.imbalance(LeaseKind.TRAIN) == Budget()


def test_what_a_refused_subtree_cost_is_settled_with_its_lease() -> None:
    table = make_table()
    lease = grant(table)
    accept(table, chain(lease))
    group = table.open_leases[lease]
    assert group.reject_subtree((0, 1), chain(lease).cost, "logprobs", "wrong")
    assert not group.reject_subtree((0, 1), chain(lease).cost, "logprobs", "wrong again"), (
        "it is counted once, however often it is sent"
    )
    end = group.with_rejected_cost(complete(lease))
    assert (end.reason, end.error) == (complete(lease).reason, "")
    table.end_lease(end)
    assert table.ledger.accounts[LeaseKind.TRAIN].spent == Budget(tokens=2 * 28, tool_calls=2 * 2)
    assert table.ledger.imbalance(LeaseKind.TRAIN) == Budget()


def test_a_lease_of_which_everything_is_refused_has_failed_and_says_why() -> None:
    """The reason is what a run without progress is given up with."""
    table = make_table()
    group = table.open_leases[grant(table)]
    for tree in range(2):
        group.reject_subtree((tree, 0), chain("a").cost, "logprobs", f"Group 0000000, tree {tree}: wrong.")
    end = group.with_rejected_cost(complete(group.lease.id))
    assert (end.reason, end.unaccounted.tokens) == (LeaseEndReason.FAILED, 2 * 28)
    assert end.error == "2 subtrees refused; the last: Group 0000000, tree 1: wrong."


def test_a_trainer_that_goes_back_is_no_fault_of_the_questions_under_way() -> None:
    """What its samplers then make is older than their leases allow; the groups begin again, and no try is counted."""
    table = make_table()
    table.version = PolicyVersion(1, 30)
    group = table.open_leases[grant(table)]
    table.version = PolicyVersion(2, 20)
    for tree in range(2):
        group.reject_subtree((tree, 0), chain("a").cost, "age", "too old")
    end = group.with_rejected_cost(complete(group.lease.id))
    assert end.reason is LeaseEndReason.RETURNED
    assert (table.end_lease(end).attempts, end.unaccounted.tokens) == (0, 2 * 28)
    assert table.ledger.imbalance(LeaseKind.TRAIN) == Budget()


async def test_a_refused_subtree_costs_its_lease_the_rest_and_nothing_else(intake: IntakeProcess) -> None:
    async with intake.with_peers("--train.batch", "1") as peers:
        sampler, trainer = peers.sampler, peers.trainer
        await publish(intake, trainer, 0, 0)
        await sampler.set_demand(2)
        lease, other = [await sampler.receive("lease") for _ in range(2)]
        await sampler.send_chain(lease.id)
        assert (await sampler.receive("ack")).refusal == ""
        bad = subtree_to_pb(EVERY["positive logprob"].of(lease.id))
        for _ in range(2):  # sent again after a reconnect, say
            await sampler.call.write(pb.RolloutRequest(subtree=bad))
            ack = await sampler.receive("ack")
            assert (ack.lease, ack.tree, ack.index) == (lease.id, 0, 1)
            assert ack.refusal == (
                "Group 0000000, tree 0, node 12: logprobs[2] is 0.31; a log-probability is finite and at most 0."
            )
        assert (await sampler.receive("stop_expanding")).lease == lease.id
        await sampler.call.write(pb.RolloutRequest(lease_end=lease_end_to_pb(complete(lease.id))))
        await sampler.roll_out(other.id)  # the stream is still open
        for position, leaves in ((0, [2]), (1, [2])):
            taken = await asyncio.to_thread(trainer.ask, Take(position, 1), Taken)
            assert [leaf.node for _, leaf in unpack_group(taken.groups[0]).leaves()] == leaves
        samples = await intake.samples()
        assert samples["treegrpo_subtrees_refused_total/logprobs"] == 1
        assert samples["treegrpo_budget_spent_total/tokens/train"] == 3 * 28, "what was refused was computed all the same"
        assert samples["treegrpo_groups_closed_total/train/complete"] == 2


async def test_what_a_refused_subtree_cost_outlives_a_restart(tmp_path: Path) -> None:
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        await sampler.set_demand(1)
        lease = await sampler.receive("lease")
        await sampler.send_request(subtree=subtree_to_pb(EVERY["positive logprob"].of(lease.id)))
        assert (await sampler.receive("ack")).refusal
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address, leases=(lease.id,)) as sampler:
        await sampler.send_request(lease_end=lease_end_to_pb(complete(lease.id)))
        await intake.until(lambda: lease.id not in intake.coordinator.lease_table.open_leases)
        assert intake.sample("budget_spent_total", kind="train", currency="tokens") == 28
        assert intake.coordinator.lease_table.ledger.imbalance(LeaseKind.TRAIN) == Budget()


async def test_a_subtree_that_cannot_even_be_read_leaves_the_stream_open(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        sampler = peers.sampler
        await publish(intake, peers.trainer, 0, 0)
        await sampler.set_demand(1)
        lease = await sampler.receive("lease")
        torn = subtree_to_pb(chain(lease.id))
        torn.steps[0].action = b"123"
        await sampler.call.write(pb.RolloutRequest(subtree=torn))
        assert (await sampler.receive("ack")).refusal.startswith("Group 0000000, tree 0, node 1: action is 3 bytes long")
        await sampler.receive("stop_expanding")
        await sampler.call.write(pb.RolloutRequest(lease_end=lease_end_to_pb(complete(lease.id))))
        assert (await sampler.receive("lease")).id != lease.id
        samples = await intake.samples()
        assert samples["treegrpo_subtrees_refused_total/action"] == 1
        assert samples["treegrpo_leases_ended_total/train/failed"] == 1, "nothing else came of it"


async def test_work_for_a_lease_that_is_not_open_is_refused_in_a_sentence(intake: IntakeProcess) -> None:
    async with intake.with_peers() as peers:
        await peers.sampler.send_chain("train-9999999")
        assert (await peers.sampler.receive("ack")).refusal == "Lease train-9999999 is not open; its subtrees are refused."
        assert (await intake.samples())["treegrpo_subtrees_refused_total/lease"] == 1


async def test_an_intake_without_a_vocabulary_does_not_start(intake: IntakeProcess) -> None:
    assert read_model_config(intake.model).vocabulary == 1000
    (intake.model / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")
    process = await intake.start()
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert stderr.decode().strip().splitlines()[-1].startswith(f"error: {intake.model / 'config.json'} has vocab_size None")
