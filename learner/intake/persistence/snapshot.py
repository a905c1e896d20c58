"""Snapshots of the intake's state, which replace the journal before them.

    snapshots/00000007/state    everything that happened before segment 7 of the journal; frames of

        {"event": "book", "format": 1, "book": …, "report": …}
        {"event": "group", "place": "kept", "lease": …, "draw": 12, …}  kept, in their order, then unfinished, then open
        {"event": "subtree", "subtree": …}                              of the group before it
        {"event": "whole", "records": 1234}                             last

A snapshot is written under a name that begins with a dot and gets its own when it is on the disk. Two generations are
kept, with the segments since the older one: should the newer be damaged, that one and a longer replay lead to the same.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.wal.filesystem import FileSystem
from learner.intake.wal.framing import BrokenFrameError, Record, encode_frame, encode_record, read_frame, split_into_frames
from treegrpo.core.lease import Lease
from treegrpo.errors import JournalError, describe
from treegrpo.v1 import rollout_pb2, tree_pb2
from treegrpo.wire.codec import lease_from_pb, lease_to_pb, subtree_from_pb

FORMAT = 1
GENERATIONS = 2
STATE = "state"
_WHOLE, _PARTIAL = re.compile(r"[0-9]{8,}"), re.compile(r"\.[0-9]{8,}")
"""Names of ours; another program's, like .DS_Store, are left alone."""
PLACES = {"kept": GroupState.READY, "unfinished": GroupState.AWAITING_LEASE, "open": GroupState.LEASED}
"""The state of the groups in each place; a kept group gets its position when all are there."""
Row = tuple[Lease, Record, tuple[bytes, ...]]


class StateCapture:
    """The state at one moment. Captured at once; encoding it, which takes long, is done by `iter_records` in another thread."""

    def __init__(self, table: LeaseTable, recorder: RunRecorder) -> None:
        self._head = {"event": "book", "format": FORMAT, "book": table.snapshot_table(), "report": recorder.snapshot_counters()}
        places = zip(
            PLACES, (table.train_queue.kept_groups(), table.unfinished_groups.values(), table.open_leases.values()), strict=True
        )
        self._groups = [_row(group, place) for place, groups in places for group in groups]

    @property
    def size_bytes(self) -> int:
        """The approximate size on the disk, without the small records."""
        return sum(len(subtree) for _, _, subtrees in self._groups for subtree in subtrees)

    def iter_records(self) -> Iterator[Record]:
        count = 1
        yield self._head
        for lease, row, subtrees in self._groups:
            yield {**row, "lease": lease_to_pb(lease).SerializeToString()}
            for subtree in subtrees:
                yield {"event": "subtree", "subtree": subtree}
            count += 1 + len(subtrees)
        yield {"event": "whole", "records": count}


def _row(group: RolloutGroup, place: str) -> Row:
    return group.lease, {"event": "group", "place": place, **group.snapshot_group()}, tuple(group.encoded)


def restore_snapshot(table: LeaseTable, recorder: RunRecorder, records: Iterator[Record]) -> None:
    """Restore a new table and recorder from the records of a `StateCapture`. Raises JournalError: it is of another format."""
    head = next(records)
    if head["format"] != FORMAT:
        raise JournalError(
            f"The newest snapshot is of format {head['format']}, and this version of treegrpo reads {FORMAT}; continue the "
            "run with the version that wrote it."
        )
    groups: dict[str, list[RolloutGroup]] = {place: [] for place in PLACES}
    group: RolloutGroup | None = None
    for record in records:
        if record["event"] == "group":
            lease, place = lease_from_pb(rollout_pb2.Lease.FromString(record["lease"])), record["place"]
            group = RolloutGroup.from_snapshot(lease, record, PLACES[place])
            groups[place].append(group)
        elif group is not None:
            group.restore_subtree(subtree_from_pb(tree_pb2.Subtree.FromString(record["subtree"])), record["subtree"])
    table.restore_table(head["book"], leased=groups["open"], unfinished=groups["unfinished"], kept=groups["kept"])
    recorder.restore_counters(head["report"])


class SnapshotStore:
    def __init__(self, disk: FileSystem, folder: Path) -> None:
        self._disk = disk
        self._folder = folder

    def snapshot_numbers(self) -> list[int]:
        """The numbers of the snapshots, newest first: of the segment after each. Raises JournalError: it cannot list them."""
        try:
            names = self._disk.list_names(self._folder)
        except OSError as error:
            raise JournalError(f"{self._folder} cannot be read ({error.strerror or error}); move that file away.") from error
        return [int(name) for name in reversed(names) if _WHOLE.fullmatch(name)]

    def snapshot_path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def write_snapshot(self, number: int, records: Iterator[Record]) -> None:
        """Write the snapshot before segment ``number``. Raises OSError, and then there is none."""
        partial, whole = self._folder / f".{number:08d}", self.snapshot_path(number)
        self._disk.make_directory(partial)
        try:
            self._write_records(partial / STATE, records)
            self._disk.sync_directory(partial)
            self._disk.rename_path(partial, whole)
        except OSError:
            with contextlib.suppress(OSError):  # gives back the room now, or `prune_generations` does it later
                self._remove(partial.name)
            raise
        self._disk.sync_directory(self._folder)

    def _write_records(self, path: Path, records: Iterator[Record]) -> None:
        file = self._disk.create_file(path)
        try:
            for batch in split_into_frames(encode_record(record) for record in records):
                file.append_bytes(encode_frame(batch))
            file.flush_to_disk()
        finally:
            file.close_file()

    def read_snapshot(self, number: int) -> Iterator[Record]:
        """The records of a snapshot, one frame in memory at a time. Raises JournalError if it is not whole."""
        path = self.snapshot_path(number) / STATE
        try:
            with self._disk.open_file(path) as file:
                count = 0
                while records := read_frame(file):
                    for record in records:
                        if record == {"event": "whole", "records": count}:
                            return
                        count += 1
                        yield record
        except (OSError, BrokenFrameError) as error:
            raise JournalError(f"The snapshot {path} is damaged or cannot be read ({describe(error)}).") from error
        raise JournalError(f"The snapshot {path} ends too soon.")

    def verify_snapshot(self, number: int) -> None:
        """Read a whole snapshot. Raises JournalError if it is damaged."""
        for _ in self.read_snapshot(number):
            pass

    def quarantine_snapshot(self, number: int) -> Path:
        """Rename a damaged snapshot, so that it is not read again."""
        aside = self.snapshot_path(number).with_suffix(".damaged")
        self._disk.rename_path(self.snapshot_path(number), aside)
        self._disk.sync_directory(self._folder)
        return aside

    def prune_generations(self) -> int:
        """Delete partial snapshots and all but the newest generations; the number of the first segment that is still needed."""
        kept = self.snapshot_numbers()[:GENERATIONS]
        for name in self._disk.list_names(self._folder):
            if _PARTIAL.fullmatch(name) or (_WHOLE.fullmatch(name) and int(name) not in kept):
                self._remove(name)
        return kept[-1] if len(kept) == GENERATIONS else 1

    def _remove(self, name: str) -> None:
        """Rename a snapshot before its files are deleted: it is there completely or not at all."""
        gone = self._folder / f".{name.removeprefix('.')}"
        if gone.name != name:
            self._disk.rename_path(self._folder / name, gone)
            self._disk.sync_directory(self._folder)
        self._delete_tree(gone)

    def _delete_tree(self, path: Path) -> None:
        """Delete a snapshot, with any files that another program has put into it."""
        with contextlib.suppress(NotADirectoryError):
            for name in self._disk.list_names(path):
                self._delete_tree(path / name)
        self._disk.remove_path(path)
