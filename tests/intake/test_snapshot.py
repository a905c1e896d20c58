from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.compaction import JournalCompactor
from learner.intake.persistence.recovery import recover_state
from learner.intake.persistence.snapshot import STATE, SnapshotStore, StateCapture
from learner.intake.wal.framing import encode_frame, encode_record
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import SegmentReader
from tests.intake.builders import make_table
from tests.intake.crash_harness import JOURNAL, SNAPSHOTS, CrashableIntake, History, described, play
from tests.intake.in_memory_filesystem import InMemoryFileSystem
from tests.intake.test_recovery import FIRST, GROUP, SECOND, THIRD
from treegrpo.core.lease import LeaseEndReason
from treegrpo.errors import JournalError
from treegrpo.observability.metrics import IntakeMetrics

pytestmark = pytest.mark.pure

SCRIPT: Sequence[Any] = [*FIRST, *SECOND, *THIRD]
SHORT: Sequence[Any] = [("grant",), ("grant",), ("grant",), *GROUP, ("subtree", 1), ("end", 1, LeaseEndReason.LOST), ("compact",)]


def samples(recorder: RunRecorder) -> dict[Any, float]:
    """All that a restart keeps of the metrics."""
    families = (family for family in recorder.metrics.registry.collect() if "journal" not in family.name)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if "seconds" not in sample.name and "created" not in sample.name and sample.value
    }


async def played(script: Sequence[Any] = SHORT) -> tuple[InMemoryFileSystem, History]:
    disk, history = InMemoryFileSystem(), History()
    play(CrashableIntake(disk, history), script)
    return disk, history


@pytest.mark.parametrize("at", range(0, len(FIRST), 3))
async def test_a_snapshot_equals_the_events_before_it(at: int) -> None:
    """With and without snapshots, a restart leads to the same book and the same metrics."""
    with_, without = InMemoryFileSystem(), InMemoryFileSystem()
    play(CrashableIntake(with_, History()), [*SCRIPT[:at], ("compact",), *SCRIPT[at:], ("commit",)])
    plain = CrashableIntake(without, History())
    plain.compact = plain.commit
    play(plain, [*SCRIPT, ("commit",)])
    after, before = (recovered(disk) for disk in (with_, without))
    assert described(after.table) == described(before.table) == described(plain.table)
    assert samples(after.recorder) == samples(before.recorder)
    assert (after.snapshots.snapshot_numbers() != [], before.snapshots.snapshot_numbers()) == (True, [])


def recovered(disk: InMemoryFileSystem) -> CrashableIntake:
    """The next start, which does not know what happened."""
    machine = CrashableIntake.__new__(CrashableIntake)
    machine.table, machine.recorder = make_table(batch=2, questions=6), RunRecorder(IntakeMetrics(), Path("/dev/null"), window=2)
    machine.snapshots = SnapshotStore(disk, SNAPSHOTS)
    recover_state(disk, JOURNAL, machine.snapshots, machine.table, machine.recorder)
    machine.recorder.export_lease_table(machine.table)
    return machine


def state_file(number: int) -> Path:
    return SNAPSHOTS / f"{number:08d}" / STATE


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("harm", ["flip", "cut"])
async def test_a_damaged_newest_snapshot_falls_back_to_the_one_before(
    share: float, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk, history = await played([*SHORT, ("grant",), *GROUP, ("compact",), ("grant",), ("commit",)])
    newest, older = SnapshotStore(disk, SNAPSHOTS).snapshot_numbers()
    data = disk.files[state_file(newest)].data
    place = int(len(data) * share)
    if harm == "flip":
        data[place] ^= 1
    else:
        del data[place:]
    machine = CrashableIntake(disk, history)
    assert described(machine.table) == history.states[-1]
    assert "It was renamed to /run/snapshots/00000003.damaged" in caplog.text
    assert machine.snapshots.snapshot_numbers() == [older]
    machine.compact()
    assert machine.snapshots.snapshot_numbers()[1] == older, "a damaged one is no generation"


async def test_recovery_needs_a_whole_snapshot_or_all_segments() -> None:
    disk, history = await played([*SHORT, ("compact",), ("compact",)])
    for number in SnapshotStore(disk, SNAPSHOTS).snapshot_numbers():
        disk.files[state_file(number)].data[50] ^= 1
    with pytest.raises(JournalError, match=r"00000001\.log is missing; restore it"):
        CrashableIntake(disk, history)


async def test_the_first_snapshot_keeps_the_whole_journal() -> None:
    disk, history = await played()
    disk.files[state_file(2)].data[50] ^= 1
    assert described(CrashableIntake(disk, history).table) == history.states[-1]


async def test_a_snapshot_of_a_later_format_is_refused() -> None:
    disk, history = await played()
    records = [{"event": "book", "format": 2}, {"event": "whole", "records": 1}]
    disk.files[state_file(2)].data[:] = encode_frame([encode_record(record) for record in records])
    with pytest.raises(JournalError, match=r"is of format 2.*continue the run with the version that wrote it"):
        CrashableIntake(disk, history)


@pytest.mark.parametrize("call", ["create", "write", "sync", "rename", "remove", "make_folder", "sync_folder"])
async def test_a_full_disk_costs_the_snapshot_and_nothing_else(call: str) -> None:
    disk, history = await played()
    machine = CrashableIntake(disk, history)
    state, number = StateCapture(machine.table, machine.recorder), machine.journal.start_segment()
    machine.commit()
    disk.full = {call: 1}
    with pytest.raises(OSError, match="No space"):
        machine.compaction.compact_journal(number.result(), state)
    play(CrashableIntake(disk, history), [("grant",), *GROUP, ("compact",), ("grant",), ("commit",)])
    machine = CrashableIntake(disk, history)
    assert described(machine.table) == history.states[-1]
    assert not [name for name in disk.list_names(SNAPSHOTS) if name.startswith(".")], "what was half written is gone"


async def test_a_snapshot_that_would_not_fit_is_not_begun() -> None:
    disk, history = await played()
    machine = CrashableIntake(disk, history)
    state = StateCapture(machine.table, machine.recorder)
    assert state.size_bytes > 0
    disk.size -= disk.free_bytes(SNAPSHOTS) - state.size_bytes + 1
    calls = len(disk.log)
    with pytest.raises(OSError, match="No space"):
        machine.compaction.compact_journal(3, state)
    assert len(disk.log) == calls, "nothing was written, and nothing dropped"
    disk.size += 1 << 20
    play(machine, [("compact",)])
    assert described(CrashableIntake(disk, history).table) == history.states[-1]


async def test_records_during_a_snapshot_are_in_the_segments_after_it() -> None:
    disk = InMemoryFileSystem()
    disk.make_directory(JOURNAL)
    table, recorder, appended = make_table(), RunRecorder(IntakeMetrics(), Path("/dev/null"), window=2), 0
    with Journal.open_journal(disk, JOURNAL, SegmentReader(disk, JOURNAL).end) as journal:

        def capture() -> StateCapture:
            table.set_aside_counts["appended"] = appended
            return StateCapture(table, recorder)

        snapshots = SnapshotStore(disk, SNAPSHOTS)
        compaction = JournalCompactor(disk, JOURNAL, journal, snapshots, capture)
        tasks = [asyncio.create_task(work) for work in (journal.commit_forever(), compaction.compact_forever())]
        async with asyncio.timeout(10):
            while len(snapshots.snapshot_numbers()) < 2:
                compaction.request_snapshot()
                waiting = [journal.append_record({"n": appended + n}) for n in range(3)]
                appended += 3
                await asyncio.gather(*waiting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for number in snapshots.snapshot_numbers():
        before = next(snapshots.read_snapshot(number))["book"]["set_aside"]["appended"]
        assert [record["n"] for record in SegmentReader(disk, JOURNAL, number)] == list(range(before, appended))
