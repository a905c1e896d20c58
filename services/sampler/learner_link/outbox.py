"""Outgoing messages that the learner has not acknowledged yet."""

from __future__ import annotations

from collections.abc import Iterator

from treegrpo.core.lease import LeaseEnd, Plan
from treegrpo.core.step import Subtree
from treegrpo.net.limits import MESSAGE_BYTES
from treegrpo.v1.rollout_pb2 import RolloutRequest
from treegrpo.wire.codec import lease_end_to_pb, subtree_to_pb
from treegrpo.wire.size_limits import message_bytes

TOKEN_BYTES = 16
"""Of a token on the wire: id and log-probability, with its share of the step's other fields."""


class Outbox:
    """Subtrees and lease ends in the order they were made, kept until the learner is known to have them.

    A subtree leaves with its ack. A lease end has none: it leaves with the ack of anything sent after it, since the
    learner takes a stream's messages in order. Keeping one too long is harmless, a lease end that comes again is ignored.

    It is full at as many subtrees as the leases that this sampler wants to hold can have, or at the bytes of these.
    """

    def __init__(self) -> None:
        self._unacked: dict[tuple[str, int, int] | str, RolloutRequest] = {}
        self._max_subtrees = self._max_bytes = 0
        self._message_bytes = MESSAGE_BYTES
        self.subtrees = 0
        """Subtrees not yet acked."""
        self.bytes = 0
        """Their size."""

    def __iter__(self) -> Iterator[RolloutRequest]:
        return iter(list(self._unacked.values()))

    def set_capacity(self, leases: int, plan: Plan) -> None:
        """Set the capacity to what a number of leases of a plan can send."""
        self._max_subtrees = leases * plan.leaves
        self._max_bytes = leases * plan.grant.tokens * TOKEN_BYTES
        self._message_bytes = message_bytes(plan)

    @property
    def full(self) -> bool:
        """Whether the outbox is at its capacity. A single subtree always fits."""
        return self.subtrees > 0 and (self.subtrees >= self._max_subtrees or self.bytes >= self._max_bytes)

    @property
    def leases(self) -> set[str]:
        """Leases with an unacked message."""
        return {key if isinstance(key, str) else key[0] for key in self._unacked}

    def put_subtree(self, subtree: Subtree) -> RolloutRequest:
        """Add a subtree; without its tool arguments if the learner would refuse the message as too large."""
        request = self._unacked[subtree.key] = RolloutRequest(subtree=subtree_to_pb(subtree))
        if request.ByteSize() > self._message_bytes:
            for step in request.subtree.steps:
                step.tool_arguments = ""
        self.subtrees += 1
        self.bytes += request.ByteSize()
        return request

    def put_lease_end(self, end: LeaseEnd) -> RolloutRequest:
        """Add a lease end."""
        request = self._unacked[end.lease] = RolloutRequest(lease_end=lease_end_to_pb(end))
        return request

    def remove_acked(self, lease: str, tree: int, index: int) -> None:
        """Remove an acked subtree, and the lease ends that were sent before it. A second ack changes nothing."""
        key = (lease, tree, index)
        if key not in self._unacked:
            return
        order = list(self._unacked)
        for earlier in order[: order.index(key)]:
            if isinstance(earlier, str):
                del self._unacked[earlier]
        self.subtrees -= 1
        self.bytes -= self._unacked.pop(key).ByteSize()

    def remove_lease_end(self, lease: str) -> None:
        """Remove the end of a void lease, which this sampler no longer holds. Its subtrees stay: the learner may accept them."""
        self._unacked.pop(lease, None)
