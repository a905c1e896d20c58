"""The lease table with a journal: each event is encoded, then changes the table, then is journaled, then recorded.

In this order, so that no error can part the journal from the table: an event that cannot be encoded changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.rollout_group import RolloutGroup
from learner.intake.monitoring.progress_clock import ProgressClock
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence import lease_events
from learner.intake.wal.framing import encode_record
from treegrpo.core.budget import Cost
from treegrpo.core.lease import Lease, LeaseEnd
from treegrpo.core.validation import tree_label
from treegrpo.v1 import rollout_pb2, tree_pb2
from treegrpo.wire.codec import lease_to_pb, subtree_from_pb
from treegrpo.wire.size_limits import check_count


class EventLog(Protocol):
    """An append-only log of events; see `Journal`."""

    def append_record(self, record: bytes) -> asyncio.Future[int]: ...

    def durable_so_far(self) -> asyncio.Future[int]: ...


class JournaledLeases:
    def __init__(
        self, table: LeaseTable, journal: EventLog, recorder: RunRecorder, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._table = table
        self._journal = journal
        self._recorder = recorder
        self._clock = clock
        self.progress_clock = ProgressClock()
        self.positions_durable = journal.durable_so_far()
        """Done when all positions that were given are durable."""

    def grant_lease(self, lease: Lease, draw: int, holder: str) -> rollout_pb2.Lease:
        """Open a lease; its message to the holder, with what its group has already."""
        record, message = encode_record(lease_events.grant_event(lease, draw, holder)), lease_to_pb(lease)
        self._table.grant_lease(lease, draw, holder, self._clock())
        self._journal.append_record(record)
        return message

    def record_subtree(self, group: RolloutGroup, sent: tree_pb2.Subtree) -> asyncio.Future[int]:
        """Accept a subtree of ``group``; the future is done when it is durable. Raises ContractError if it is rejected."""
        where = tree_label(sent.lease, sent.tree, group.group.id)
        check_count(len(sent.steps), len(sent.leaves), group.lease.plan, f"{where}: subtree {sent.index}")
        subtree = subtree_from_pb(sent, group.group.id)
        encoded = sent.SerializeToString()
        record = encode_record(lease_events.subtree_event(encoded))
        if not self._table.accept_subtree(group, subtree, encoded):
            self._recorder.record_duplicate()
            return self._journal.durable_so_far()
        done = self._journal.append_record(record)
        self.progress_clock.record_progress()
        self._recorder.record_subtree(group, subtree)
        return done

    def reject_subtree(
        self, group: RolloutGroup, key: tuple[int, int], cost: Cost, reason: str, why: str
    ) -> asyncio.Future[int] | None:
        """Reject a subtree of an open lease; the future is done when that is durable, None if nothing changes."""
        record = encode_record(lease_events.rejection_event(group.lease.id, key, cost, reason, why))
        if not group.reject_subtree(key, cost, reason, why):
            return None
        return self._journal.append_record(record)

    def end_lease(self, end: LeaseEnd, *, excused: bool = False) -> RolloutGroup:
        """Close a lease; ``excused``: it does not count against its question."""
        record = encode_record(lease_events.lease_end_event(end, excused=excused))
        group = self._table.end_lease(end, excused=excused)
        self._journal.append_record(record)
        self._recorder.record_lease_end(group, end)
        return group

    def close_group(self, draw: int) -> None:
        """Close a group at the staleness bound, before its lease ends."""
        record = encode_record(lease_events.group_close_event(draw))
        group = self._table.close_group(draw)
        self._journal.append_record(record)
        self._recorder.record_group_close(group, "overdue")

    def assign_positions(self, draws: Sequence[int], stale: Sequence[int]) -> None:
        """Give the groups of ``draws`` the next positions, and set the ``stale`` ones aside."""
        record = encode_record(lease_events.positions_event(draws, stale))
        set_aside = self._table.assign_positions(draws, stale)
        self.positions_durable = self._journal.append_record(record)
        for group in set_aside:
            self._recorder.record_group_close(group, "stale")
