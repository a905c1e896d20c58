from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.intake.builders import PLAN, chain, question, step
from treegrpo.core.budget import Budget
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason, LeaseKind
from treegrpo.core.step import PolicyVersion, StepStatus
from treegrpo.errors import ContractError, TreeError
from treegrpo.v1 import rollout_pb2, tree_pb2
from treegrpo.wire import codec

pytestmark = pytest.mark.pure


def test_a_subtree_survives_the_wire_bit_for_bit() -> None:
    sent = chain("train-1", tree=1, index=0)
    wire = codec.subtree_to_pb(sent).SerializeToString()
    got = codec.subtree_from_pb(tree_pb2.Subtree.FromString(wire))
    assert codec.subtree_to_pb(got).SerializeToString(deterministic=True) == codec.subtree_to_pb(sent).SerializeToString(
        deterministic=True
    )
    assert (got.key, got.parent, got.cost) == (sent.key, sent.parent, sent.cost)
    for a, b in zip(sent.steps, got.steps, strict=True):
        assert a.action.dtype == b.action.dtype == np.uint32
        assert np.array_equal(a.action, b.action)
        assert np.array_equal(a.logprobs, b.logprobs)
        assert (a.spans, a.status, a.valid) == (b.spans, b.status, b.valid)
    assert np.array_equal(sent.prompt, got.prompt)


def test_ids_travel_as_little_endian_uint32_and_logprobs_as_float32() -> None:
    sent = codec.step_to_pb(replace(step(1, 0, actions=2), action=np.array([1, 2**31], np.uint32)))
    assert sent.action == b"\x01\x00\x00\x00\x00\x00\x00\x80"
    assert sent.logprobs == np.array([-0.5, -0.5], "<f4").tobytes()


def test_every_status_kind_and_reason_has_its_number() -> None:
    for status in StepStatus:
        assert codec.step_from_pb(codec.step_to_pb(step(1, 0, status=status)), "tree").status is status
    for reason in LeaseEndReason:
        end = LeaseEnd("a", reason, forgone=2, error="why")
        assert codec.lease_end_from_pb(codec.lease_end_to_pb(end)) == end
    for kind in LeaseKind:
        lease = Lease("a", kind, question(1), PLAN, Budget(5, 2), 2**63, PolicyVersion(1, 7))
        assert codec.lease_from_pb(codec.lease_to_pb(lease)) == lease


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"action": b"123"}, "action is 3 bytes long, not a multiple of uint32"),
        ({"observation": b"1"}, "observation is 1 bytes long, not a multiple of uint32"),
        ({"logprobs": b"12345"}, "logprobs is 5 bytes long, not a multiple of float32"),
        ({"status": 0}, "status is 0, which this version of the contract does not know"),
    ],
)
def test_a_step_from_a_stranger_is_checked(changes: dict[str, object], says: str) -> None:
    pb = codec.subtree_to_pb(chain("a", tree=1))
    for field, value in changes.items():
        setattr(pb.steps[1], field, value)
    with pytest.raises(TreeError) as refusal:
        codec.subtree_from_pb(pb, "q-17")
    assert str(refusal.value).startswith(f"Group q-17, tree 1, node 2: {says}")
    assert {refusal.value.field} == set(changes)


def test_a_prompt_from_a_stranger_is_checked() -> None:
    pb = codec.subtree_to_pb(chain("a"))
    pb.prompt += b"1"
    with pytest.raises(TreeError, match=r"^Lease a, tree 0: prompt is 29 bytes long"):
        codec.subtree_from_pb(pb)


def test_a_lease_of_an_unknown_kind_or_an_empty_plan_is_refused() -> None:
    with pytest.raises(ContractError, match="is of kind 0"):
        codec.lease_from_pb(rollout_pb2.Lease(id="a"))
    with pytest.raises(ContractError, match="asks for nothing"):
        codec.plan_from_pb(rollout_pb2.Plan(trees=1))
    with pytest.raises(ContractError, match="ended for reason 0"):
        codec.lease_end_from_pb(rollout_pb2.LeaseEnd(lease="a"))
