"""The clerk: each event is encoded, then changes the book, then goes into the journal, then into the reports.

In this order, so that no error can part the journal from the book: what cannot be written down changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from learner.intake.leases.lease_table import LeaseBook
from learner.intake.leases.rollout_group import OpenGroup
from learner.intake.leases.subtree_validation import not_open
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

log = logging.getLogger(__name__)


class Log(Protocol):
    """Where events are kept; see `Journal`."""

    def append_record(self, record: bytes) -> asyncio.Future[int]: ...

    def durable_so_far(self) -> asyncio.Future[int]: ...


class Clerk:
    def __init__(self, book: LeaseBook, journal: Log, reporter: RunRecorder) -> None:
        self._book = book
        self._journal = journal
        self._reporter = reporter
        self.pace = ProgressClock()
        self.given = journal.durable_so_far()
        """Done when all positions that were given are durable."""

    def grant(self, lease: Lease, draw: int, holder: str) -> rollout_pb2.Lease:
        """The lease as it goes to its holder, with what its group has already."""
        record, message = encode_record(lease_events.granted(lease, draw, holder)), lease_to_pb(lease)
        self._book.granted(lease, draw, holder, time.monotonic())
        self._journal.append_record(record)
        return message

    def accept(self, sent: tree_pb2.Subtree) -> asyncio.Future[int]:
        """Take a subtree in; the future is done when it is durable. Raises ContractError if it is refused."""
        group = self._book.find(sent.lease)
        if group is None:
            raise not_open(sent.lease)
        where = tree_label(sent.lease, sent.tree, group.group.id)
        check_count(len(sent.steps), len(sent.leaves), group.lease.plan, f"{where}: subtree {sent.index}")
        subtree = subtree_from_pb(sent, group.group.id)
        encoded = sent.SerializeToString()
        record = encode_record(lease_events.accepted(encoded))
        if not self._book.accept(subtree, encoded):
            self._reporter.record_duplicate()
            return self._journal.durable_so_far()
        done = self._journal.append_record(record)
        self.pace.record_progress()
        self._reporter.record_subtree(group, subtree)
        return done

    def refuse(self, lease: str, key: tuple[int, int], cost: Cost, reason: str, why: str) -> asyncio.Future[int] | None:
        """Leave a subtree of an open lease out; done when that is durable, None if nothing changes."""
        record = encode_record(lease_events.refused(lease, key, cost, reason, why))
        if not self._book.refuse(lease, key, cost, reason, why):
            return None
        return self._journal.append_record(record)

    def end(self, end: LeaseEnd, *, excused: bool = False) -> OpenGroup:
        """A lease ends; ``excused``: it does not count against its question."""
        record = encode_record(lease_events.ended(end, excused=excused))
        group = self._book.ended(end, excused=excused)
        self._journal.append_record(record)
        self._reporter.record_lease_end(group, end)
        return group

    def close(self, draw: int) -> None:
        """A group closes at the staleness bound, before its lease ends."""
        record = encode_record(lease_events.closed(draw))
        group = self._book.close(draw)
        self._journal.append_record(record)
        self._reporter.record_group_close(group, "overdue")

    def give(self, draws: Sequence[int], stale: Sequence[int]) -> None:
        """The trainer is to get ``draws`` at the next positions, and those that are ``stale`` never."""
        record = encode_record(lease_events.taken(draws, stale))
        left_out = self._book.taken(draws, stale)
        self.given = self._journal.append_record(record)
        for group in left_out:
            self._reporter.record_group_close(group, "stale")
