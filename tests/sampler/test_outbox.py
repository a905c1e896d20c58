"""Unacknowledged messages: order, capacity, and size."""

from __future__ import annotations

import numpy as np
import pytest

from services.sampler.learner_link.outbox import Outbox
from tests.sampler.fakes import plan
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import Step, Subtree
from treegrpo.wire.size_limits import message_bytes

pytestmark = pytest.mark.pure


def subtree(index: int, name: str) -> Subtree:
    one = np.ones(1, np.uint32)
    return Subtree(name, 0, index, 0, (Step(index + 1, 0, one, np.ones(1, np.float32), one),))


def test_an_ack_confirms_the_lease_ends_that_were_sent_before_it() -> None:
    outbox = Outbox()
    outbox.put_subtree(subtree(0, "a"))
    outbox.put_lease_end(LeaseEnd("a", LeaseEndReason.COMPLETE))
    outbox.put_subtree(subtree(0, "b"))
    outbox.put_lease_end(LeaseEnd("b", LeaseEndReason.COMPLETE))
    outbox.remove_acked("b", 0, 0)
    assert outbox.leases == {"a", "b"}
    assert [request.WhichOneof("kind") for request in outbox] == ["subtree", "lease_end"]
    outbox.remove_acked("b", 0, 0)
    outbox.remove_acked("a", 0, 0)
    assert [request.lease_end.lease for request in outbox] == ["b"]
    outbox.remove_lease_end("b")
    assert outbox.subtrees == outbox.bytes == len(outbox.leases) == 0


def test_it_is_full_at_what_the_leases_that_are_wanted_can_bring() -> None:
    outbox = Outbox()
    outbox.set_capacity(2, plan(1, 0, 0))
    for name in ("a", "b"):
        assert not outbox.full
        outbox.put_subtree(subtree(0, name))
    assert outbox.full
    outbox.remove_acked("a", 0, 0)
    outbox.remove_acked("a", 0, 0)
    assert not outbox.full


def test_it_is_full_at_their_bytes_too_but_one_subtree_finds_room() -> None:
    outbox = Outbox()
    outbox.set_capacity(2, plan(1, 0, 0, max_context=2))
    assert not outbox.full
    outbox.put_subtree(subtree(0, "a"))
    assert outbox.bytes > 2 * 2 * 16 - 32
    outbox.put_subtree(subtree(0, "b"))
    assert outbox.full


def test_a_message_that_is_too_large_goes_without_its_tool_arguments() -> None:
    outbox, asked = Outbox(), plan(1, 0, 0)
    outbox.set_capacity(2, asked)
    one = np.ones(1, np.uint32)
    steps = tuple(
        Step(node, node - 1, one, np.ones(1, np.float32), one, tool="t", tool_arguments="河" * 60_000) for node in range(1, 9)
    )
    kept = outbox.put_subtree(Subtree("a", 0, 0, 0, steps[:1]))
    cut = outbox.put_subtree(Subtree("b", 0, 0, 0, steps))
    assert len(kept.subtree.steps[0].tool_arguments) == 60_000
    assert cut.ByteSize() <= message_bytes(asked)
    assert [(step.tool, step.tool_arguments) for step in cut.subtree.steps] == [("t", "")] * 8
    assert outbox.bytes == kept.ByteSize() + cut.ByteSize()
