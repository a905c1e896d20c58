"""Recovers the state of the intake after a restart: the newest whole snapshot, then every event since.

    before a crash                                  after it
    trainer  checkpoint renamed ─► Covered(p)       starts at p, or, if that checkpoint is damaged, at the one before
    intake   Covered(p) ─► segment cut ─►           older snapshot, longer replay: the same state, more groups kept
             snapshot renamed ─►                    newer snapshot, segments that are not read
             older snapshot and segments dropped    newer snapshot

The two sides need not agree on how far they got. A group is forgotten at Covered(p) only if the Covered before it had
covered it already, so whichever snapshot and checkpoint are left, the groups from that checkpoint's position on are
there: in the snapshot, or in the segments since.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from learner.intake.leases.lease_table import LeaseTable
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.lease_events import replay_event
from learner.intake.persistence.snapshot import SnapshotStore, restore_snapshot
from learner.intake.wal.filesystem import FileSystem, LocalFileSystem
from learner.intake.wal.segments import JournalEnd, SegmentReader
from treegrpo.errors import ContractError, JournalError

log = logging.getLogger(__name__)
JOURNAL, SNAPSHOTS = "journal", "snapshots"
"""Their folders in the run's directory."""


@dataclass(frozen=True, slots=True)
class RecoveryResult:
    end: JournalEnd
    """Where the journal continues."""
    fresh: bool
    """There was nothing to recover."""


def recover_state(
    disk: FileSystem, journal: Path, snapshots: SnapshotStore, table: LeaseTable, recorder: RunRecorder
) -> RecoveryResult:
    """Restore a new lease table and recorder. Raises JournalError: the files are incomplete or contradict each other."""
    number = _newest_whole(snapshots)
    if number:
        restore_snapshot(table, recorder, snapshots.read_snapshot(number))
    segments = SegmentReader(disk, journal, first=number or 1)
    events = 0
    try:
        for event in segments:
            replay_event(table, recorder, event)
            events += 1
    except ContractError as error:
        raise JournalError(f"The journal {journal} contradicts itself ({error}); restore it, or begin a new run.dir.") from error
    if number or events:
        log.info("recovered from %s and %d events since", f"snapshot {number}" if number else "no snapshot", events)
    return RecoveryResult(segments.end, fresh=not number and not events)


def has_recorded_events(run_dir: Path) -> bool:
    """Whether anything was recorded in a run's directory. Raises JournalError: it cannot be read."""
    disk = LocalFileSystem()
    if SnapshotStore(disk, run_dir / SNAPSHOTS).snapshot_numbers():
        return True
    return next(iter(SegmentReader(disk, run_dir / JOURNAL)), None) is not None


def _newest_whole(snapshots: SnapshotStore) -> int:
    """The number of the newest whole snapshot, 0 for none; damaged ones are renamed."""
    for number in snapshots.snapshot_numbers():
        try:
            snapshots.verify_snapshot(number)
        except JournalError as damaged:
            aside = snapshots.quarantine_snapshot(number)
            log.error("%s It was renamed to %s.", damaged, aside)  # noqa: TRY400 - one sentence is enough
        else:
            return number
    return 0
