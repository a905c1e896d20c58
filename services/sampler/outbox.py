"""What the learner may not have yet."""

from __future__ import annotations

from collections.abc import Iterator

from treegrpo.codec import lease_end_to_pb, subtree_to_pb
from treegrpo.lease import LeaseEnd
from treegrpo.tree import Subtree
from treegrpo.v1.rollout_pb2 import RolloutRequest


class Outbox:
    """Subtrees and lease ends in the order they were made, kept until the learner is known to have them.

    A subtree leaves with its ack. A lease end has none: it leaves with the ack of anything sent after it, since the
    learner takes a stream's messages in order. Keeping one too long is harmless, an end that comes again is ignored.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, int, int] | str, RolloutRequest] = {}

    def __iter__(self) -> Iterator[RolloutRequest]:
        return iter(list(self._waiting.values()))

    @property
    def subtrees(self) -> int:
        """Subtrees not yet acked."""
        return sum(not isinstance(key, str) for key in self._waiting)

    @property
    def leases(self) -> set[str]:
        """Leases of which something waits."""
        return {key if isinstance(key, str) else key[0] for key in self._waiting}

    def put_subtree(self, subtree: Subtree) -> RolloutRequest:
        request = self._waiting[subtree.key] = RolloutRequest(subtree=subtree_to_pb(subtree))
        return request

    def put_end(self, end: LeaseEnd) -> RolloutRequest:
        request = self._waiting[end.lease] = RolloutRequest(lease_end=lease_end_to_pb(end))
        return request

    def acked(self, lease: str, tree: int, index: int) -> None:
        """The learner has this subtree, and the lease ends that were sent before it. A second ack changes nothing."""
        key = (lease, tree, index)
        if key not in self._waiting:
            return
        order = list(self._waiting)
        for earlier in order[: order.index(key)]:
            if isinstance(earlier, str):
                del self._waiting[earlier]
        del self._waiting[key]

    def drop(self, lease: str) -> None:
        """The lease is void: nobody wants its work."""
        for key in [key for key in self._waiting if lease in (key, key[0])]:
            del self._waiting[key]
