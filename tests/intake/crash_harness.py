"""An intake without network on a disk in memory, and a trainer that only counts; both can be stopped at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner.intake.coordinator.batcher import Batcher
from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.compaction import JournalCompactor
from learner.intake.persistence.recovery import recover_state
from learner.intake.persistence.snapshot import SnapshotStore, StateCapture
from learner.intake.wal.framing import Record
from learner.intake.wal.journal import Journal
from tests.intake.builders import bound, chain, kept, make_table, question
from tests.intake.in_memory_filesystem import InMemoryFileSystem
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import PolicyVersion, Subtree, VersionSpan
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.wire.codec import subtree_to_pb

JOURNAL, SNAPSHOTS = Path("/run/journal"), Path("/run/snapshots")
BATCH = 2


class History:
    """What happened, event by event, over all lives of an intake."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        """After each event; the first is the state before any."""
        self.line: list[Any] = []
        """Groups by position."""
        self.acked = 0
        """Events that were acknowledged."""
        self.checkpoints = [0]
        """The trainer's, by position."""

    def copy(self) -> History:
        other = History()
        other.states, other.line, other.acked = list(self.states), list(self.line), self.acked
        other.checkpoints = list(self.checkpoints)
        return other


class CrashableIntake:
    """One life of an intake. Nothing runs by itself: `commit` and `compact` write.

    It begins with the check that what it found is a prefix of what happened, with all that was acknowledged, and joins up
    with either of the trainer's last two checkpoints.
    """

    def __init__(self, disk: InMemoryFileSystem, history: History) -> None:
        self.disk, self.history = disk, history
        self.snapshots = SnapshotStore(disk, SNAPSHOTS)
        self.table, self.recorder = (
            make_table(batch=BATCH, questions=6),
            RunRecorder(IntakeMetrics(), Path("/dev/null"), window=BATCH),
        )
        self.recovered = recover_state(disk, JOURNAL, self.snapshots, self.table, self.recorder)
        self.recorder.export_lease_table(self.table)
        disk.make_directory(JOURNAL)
        self.journal = Journal(disk, JOURNAL, self.recovered.end)
        self.compaction = JournalCompactor(
            disk, JOURNAL, self.journal, self.snapshots, lambda: StateCapture(self.table, self.recorder)
        )
        self.leases = JournaledLeases(self.table, self.journal, self.recorder)
        self.batcher = Batcher(self.table, self.leases, bound(self.table, self.leases))
        if not history.states:
            history.states.append(described(self.table))
        found = described(self.table)
        kept = next((i for i, state in enumerate(history.states) if state == found), -1)
        assert kept >= history.acked, "lost what was acknowledged, or made something up"
        for position in history.checkpoints[-2:]:
            groups = [group_described(group) for group in self.table.train_queue.groups_from(position, 1000)]
            assert groups == history.line[position : self.table.train_queue.end_position], "does not join up with a checkpoint"
        del history.states[kept + 1 :]
        del history.line[self.table.train_queue.end_position :]
        self.publish(history.checkpoints[-1] // BATCH)
        kept, append = len(history.states) - 1, self.journal.append_record
        self._waiting: list[asyncio.Future[int]] = []

        def watched(record: Record | bytes) -> asyncio.Future[int]:
            history.states.append(described(self.table))
            for group in self.table.train_queue.groups_from(len(history.line), 1000):
                history.line.append(group_described(group))
            self._waiting.append(append(record))
            return self._waiting[-1]

        self.journal.append_record = watched
        self._kept = kept
        self.commit()

    # ---- what writes

    def commit(self) -> None:
        while self.journal.has_pending:
            self.journal.resolve_records(self.journal.commit_next())
            self.history.acked = max(self.history.acked, self._kept + sum(future.done() for future in self._waiting))

    def compact(self) -> None:
        state, cut = StateCapture(self.table, self.recorder), self.journal.start_segment()
        self.commit()
        self.compaction.compact_journal(cut.result(), state)

    # ---- what happens

    def publish(self, step: int) -> None:
        self.table.set_policy_version(PolicyVersion(1, step), step * BATCH)

    def grant(self, holder: str = "s/1") -> None:
        if (work := self.table.next_lease()) is not None:
            self.leases.grant_lease(*work, holder)

    def _open(self, pick: int) -> RolloutGroup | None:
        groups = [group for group in self.table.open_leases.values() if group.state is GroupState.LEASED]
        return groups[pick % len(groups)] if groups else None

    def subtree(self, pick: int = 0) -> None:
        """The next chain of an open group."""
        if (group := self._open(pick)) is not None:
            trees = [tree for tree in range(group.lease.plan.trees) if tree not in group.group.trees]
            if trees:
                version = max(PolicyVersion(1, self.step), group.lease.min_version)
                sent = subtree_to_pb(sampled(chain(group.lease.id, tree=trees[0]), version))
                self.leases.record_subtree(group, sent)

    def refuse(self, pick: int = 0, tree: int = 0, reason: str = "age") -> None:
        """A subtree of an open group is not what was asked for."""
        if (group := self._open(pick)) is not None:
            cost = Cost(prefilled=7, decoded=5, tool_calls=1, seconds=0.5)
            self.leases.reject_subtree(group, (tree, 1), cost, reason, "it is not")

    def end(self, pick: int = 0, reason: LeaseEndReason = LeaseEndReason.COMPLETE) -> None:
        if (group := self._open(pick)) is not None:
            end = LeaseEnd(group.lease.id, reason)
            self.leases.end_lease(group.with_rejected_cost(end) if reason.from_sampler else end)

    def evaluate(self) -> None:
        assert self.table.version is not None
        self.table.queue_evaluation(self.table.version, [question(100), question(101)])

    def fall_back(self) -> None:
        """The trainer's newest checkpoint turns out to be damaged; it goes on from the one before."""
        if len(self.history.checkpoints) > 1:
            self.history.checkpoints.pop()
            self.publish(self.history.checkpoints[-1] // BATCH)

    @property
    def step(self) -> int:
        return self.table.version.step if self.table.version else 0

    def train(self) -> None:
        """Take a batch if there is one, train it, write a checkpoint, and say so."""
        position = self.step * BATCH
        taken = self.batcher.take_batch(position, BATCH)
        self.commit()
        if len(taken) == BATCH:
            self.publish(self.step + 1)
            self.history.checkpoints.append(position + BATCH)
            self.grant()
            self.commit()
            self.table.train_queue.mark_covered(position + BATCH)
            self.compact()


def described(table: LeaseTable) -> dict[str, Any]:
    """All that a restart must keep, besides how far back groups are kept."""
    state = table.snapshot_table()
    del state["groups"]
    state["line_end"] = table.train_queue.end_position
    state["ready"] = [group_described(group) for group in table.train_queue.ready_groups]
    state["open"] = [group_described(group) for group in table.open_leases.values()]
    state["unfinished"] = [group_described(group) for _, group in sorted(table.unfinished_groups.items())]
    return state


def group_described(group: RolloutGroup) -> tuple[Any, ...]:
    subtrees = [(subtree.key, subtree.cost, str(subtree.steps[0].spans)) for subtree in kept(group)]
    return group.lease.id, group.group.id, group.snapshot_group(), subtrees


def sampled(subtree: Subtree, version: PolicyVersion) -> Subtree:
    """``subtree`` as this version would have sampled it."""
    steps = [replace(step, spans=(VersionSpan(version, 0, len(step.action)),)) for step in subtree.steps]
    return replace(subtree, steps=tuple(steps))


def play(machine: CrashableIntake, script: Sequence[Sequence[Any]]) -> None:
    """Let things happen: each is the name of a method and its arguments."""
    for name, *arguments in script:
        getattr(machine, name)(*arguments)
