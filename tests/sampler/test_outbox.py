"""What the learner may not have yet."""

from __future__ import annotations

import numpy as np

from services.sampler.outbox import Outbox
from treegrpo.lease import LeaseEnd, LeaseEndReason
from treegrpo.tree import Step, Subtree


def subtree(index: int, name: str) -> Subtree:
    one = np.ones(1, np.uint32)
    return Subtree(name, 0, index, 0, (Step(index + 1, 0, one, np.ones(1, np.float32), one),))


def test_an_ack_confirms_the_lease_ends_that_were_sent_before_it() -> None:
    outbox = Outbox()
    outbox.put_subtree(subtree(0, "a"))
    outbox.put_end(LeaseEnd("a", LeaseEndReason.COMPLETE))
    outbox.put_subtree(subtree(0, "b"))
    outbox.put_end(LeaseEnd("b", LeaseEndReason.COMPLETE))
    outbox.acked("b", 0, 0)
    assert outbox.leases == {"a", "b"}
    assert [request.WhichOneof("kind") for request in outbox] == ["subtree", "lease_end"]
    outbox.acked("b", 0, 0)
    outbox.acked("a", 0, 0)
    assert [request.lease_end.lease for request in outbox] == ["b"]
    outbox.drop("b")
    assert outbox.subtrees == len(outbox.leases) == 0
