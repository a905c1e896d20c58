from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import tracemalloc
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from learner.intake.wal.filesystem import FileSystem, LocalFileSystem
from learner.intake.wal.framing import BATCH_BYTES, MAX_RECORD_BYTES, encode_frame, encode_record
from learner.intake.wal.journal import BACKLOG_BYTES, Journal
from learner.intake.wal.segments import JournalEnd, SegmentReader, drop_segments, segment_path
from tests.intake.in_memory_filesystem import CrashError, InMemoryFileSystem
from treegrpo.errors import JournalError
from treegrpo.timing.backoff import Backoff

pytestmark = pytest.mark.pure

FOLDER = Path("/journal")


@contextlib.asynccontextmanager
async def at_work(disk: FileSystem, folder: Path = FOLDER) -> AsyncGenerator[Journal]:
    """A journal that goes on where the one before stopped, and its committing task."""
    with Journal.open_journal(disk, folder, ended(disk, folder), backoff=Backoff((0.0,))) as journal:
        writer = asyncio.create_task(journal.commit_forever())
        yield journal
        writer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writer


def ended(disk: FileSystem, folder: Path = FOLDER) -> JournalEnd:
    segments = SegmentReader(disk, folder)
    for _ in segments:
        pass
    return segments.end


async def write(disk: FileSystem, *records: dict[str, Any], folder: Path = FOLDER) -> None:
    async with at_work(disk, folder) as journal:
        for record in records:
            await journal.append_record(record)


def read(disk: FileSystem, folder: Path = FOLDER, first: int = 1) -> list[Any]:
    return [record.get("n") for record in SegmentReader(disk, folder, first)]


async def test_acknowledged_records_are_read_back_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "journal"
    await write(LocalFileSystem(), {"n": 1}, {"n": 2}, folder=folder)
    await write(LocalFileSystem(), {"n": 3}, folder=folder)
    assert read(LocalFileSystem(), folder) == [1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["00000001.log", "00000002.log"]


@pytest.mark.parametrize("lost", range(1, 45))
async def test_a_torn_tail_is_cut_off_with_a_warning(lost: int, caplog: pytest.LogCaptureFixture) -> None:
    disk = InMemoryFileSystem()
    torn = {"n": 2, "text": "x" * 40}
    await write(disk, {"n": 1}, torn)
    inode = disk.files[segment_path(FOLDER, 1)]
    del inode.data[-lost:]
    assert read(disk) == [1]
    await write(disk, {"n": 3})
    assert read(disk) == [1, 3]
    assert f"left out the last {len(encode_frame([encode_record(torn)])) - lost} bytes" in caplog.text
    assert "not acknowledged yet, or the disk has damaged one that was" in caplog.text  # nobody can tell which


async def test_zeros_at_the_end_are_a_torn_tail() -> None:
    disk = InMemoryFileSystem()
    await write(disk, {"n": 1})
    disk.files[segment_path(FOLDER, 1)].data += bytes(5000)
    assert read(disk) == [1]


@pytest.mark.parametrize("place", range(62))
async def test_damage_before_a_later_commit_is_no_torn_tail(place: int) -> None:
    disk = InMemoryFileSystem()
    await write(disk, {"n": 1}, {"n": 2})
    disk.files[segment_path(FOLDER, 1)].data[place] ^= 1
    with pytest.raises(JournalError, match=r"00000001\.log is damaged at byte .* restore that file"):
        read(disk)


@pytest.mark.parametrize("lost", [1, len(encode_frame([encode_record({"n": 2})])), 30])
async def test_an_earlier_segment_without_its_end_is_damaged(lost: int) -> None:
    disk = InMemoryFileSystem()
    await write(disk, {"n": 1}, {"n": 2})
    await write(disk, {"n": 3})
    del disk.files[segment_path(FOLDER, 1)].data[-lost:]
    with pytest.raises(JournalError, match=r"00000001\.log is damaged"):
        read(disk)


@pytest.mark.parametrize("gone", [1, 2])
async def test_a_missing_segment_is_an_error_that_names_it(gone: int) -> None:
    disk = InMemoryFileSystem()
    for n in range(3):
        await write(disk, {"n": n})
    del disk.files[segment_path(FOLDER, gone)]
    with pytest.raises(JournalError, match=rf"0000000{gone}\.log is missing; restore it"):
        read(disk)


async def test_a_segment_that_a_snapshot_stands_before_must_be_there() -> None:
    disk = InMemoryFileSystem()
    await write(disk, {"n": 1})
    with pytest.raises(JournalError, match=r"00000002\.log is missing"):
        read(disk, first=2)


def test_a_journal_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "journal.msgpack").write_bytes(b"")
    with pytest.raises(JournalError, match=r"is of an earlier version of treegrpo.*another directory"):
        read(LocalFileSystem(), tmp_path)


async def test_start_segment_returns_its_number_once_all_before_is_durable() -> None:
    disk = InMemoryFileSystem()
    async with at_work(disk) as journal:
        before = journal.append_record({"n": 1})
        cut, after = journal.start_segment(), journal.append_record({"n": 2})
        assert (await after, await cut, await before) == (2, 2, 1)
    assert read(disk, first=2) == [2]
    drop_segments(disk, FOLDER, before=2)
    assert read(disk.after_crash(), first=2) == [2]


@pytest.mark.parametrize("call", ["write", "create"])
@pytest.mark.parametrize("partial", [0.0, 0.5, 1.0])
async def test_a_full_disk_blocks_the_journal_and_loses_nothing(
    call: str, partial: float, caplog: pytest.LogCaptureFixture
) -> None:
    disk = InMemoryFileSystem()
    async with at_work(disk) as journal:
        await journal.append_record({"n": 1})
        disk.partial, disk.full = partial, {call: 5}
        blocked: list[bool] = []
        journal.on_availability_change = lambda: blocked.append(journal.blocked)
        waiting = (
            [journal.append_record({"n": n}) for n in (2, 3)]
            if call == "write"
            else [journal.start_segment(), journal.append_record({"n": 2})]
        )
        await asyncio.gather(*waiting)
        assert blocked == [True, False]
        assert disk.full[call] == 0
    assert read(disk) == ([1, 2, 3] if call == "write" else [1, 2])
    assert read(disk.after_crash()) == read(disk)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1, "said once, not at every attempt"
    assert "nothing is acknowledged or granted" in said[0]
    assert len(disk.list_names(FOLDER)) == (1 if call == "write" else 2), "a write that failed is cut back, its segment goes on"


async def test_nothing_partial_stays_while_the_disk_is_full() -> None:
    disk = InMemoryFileSystem()
    async with at_work(disk) as journal:
        await journal.append_record({"n": 1})
        size = len(disk.files[segment_path(FOLDER, 1)].data)
        disk.partial, disk.full = 0.7, {"write": 1}
        sizes: list[int] = []
        journal.on_availability_change = lambda: sizes.append(len(disk.files[segment_path(FOLDER, 1)].data))
        await journal.append_record({"n": 2})
        assert sizes[0] == size


@pytest.mark.parametrize("call", ["sync", "truncate"])
async def test_after_a_failed_fsync_the_batch_goes_to_a_new_segment(call: str) -> None:
    disk = InMemoryFileSystem()
    async with at_work(disk) as journal:
        await journal.append_record({"n": 1})
        disk.full = {"sync": 1} if call == "sync" else {"write": 1, "truncate": 2}
        disk.partial = 0.5
        assert await journal.append_record({"n": 2}) == 2
        assert await journal.append_record({"n": 3}) == 2
    assert disk.list_names(FOLDER) == ["00000001.log", "00000002.log"]
    assert read(disk) == [1, 2, 3]
    assert read(disk.after_crash()) == [1, 2, 3], "a second fsync of the same file would have kept nothing"


async def test_senders_wait_while_too_much_is_unwritten() -> None:
    disk = InMemoryFileSystem()
    disk.full = {"create": 1_000_000}
    async with at_work(disk) as journal:
        record = {"n": 1, "data": bytes(MAX_RECORD_BYTES - 100)}

        async def feed() -> asyncio.Future[int]:
            await journal.wait_for_capacity()
            assert journal.backlog_bytes <= BACKLOG_BYTES
            return journal.append_record(record)

        *_, last = [await feed() for _ in range(3)]
        waiting = asyncio.create_task(journal.wait_for_capacity())
        await asyncio.sleep(0)
        assert not waiting.done()
        disk.full = {}
        await waiting
        await last
        assert journal.backlog_bytes == 0


async def test_a_record_beyond_the_limit_is_refused() -> None:
    async with at_work(InMemoryFileSystem()) as journal:
        with pytest.raises(ValueError, match="larger than the limit"):
            journal.append_record({"data": bytes(MAX_RECORD_BYTES)})


async def test_pending_records_are_written_at_the_end() -> None:
    disk = InMemoryFileSystem()
    with Journal.open_journal(disk, FOLDER, JournalEnd()) as journal:
        for n in range(3):
            journal.append_record({"n": n, "data": bytes(BATCH_BYTES)})
    assert read(disk) == [0, 1, 2]


async def test_a_disk_that_is_full_at_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    disk = InMemoryFileSystem()
    disk.full = {"write": 1}
    with Journal.open_journal(disk, FOLDER, JournalEnd()) as journal:
        journal.append_record({"n": 1})
    assert "1 events are not in the journal" in caplog.text


async def test_a_cancelled_commit_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncing, go_on = threading.Event(), threading.Event()
    sync = os.fsync

    def slow(descriptor: int) -> None:
        syncing.set()
        go_on.wait(10)
        sync(descriptor)

    with Journal.open_journal(LocalFileSystem(), tmp_path, JournalEnd()) as journal:
        writer = asyncio.create_task(journal.commit_forever())
        await journal.append_record({"n": 0})
        monkeypatch.setattr(os, "fsync", slow)
        journal.append_record({"n": 1})
        await asyncio.to_thread(syncing.wait, 10)
        writer.cancel()
        journal.append_record({"n": 2})
        go_on.set()
    assert read(LocalFileSystem(), tmp_path) == [0, 1, 2]


async def test_reading_holds_one_frame_in_memory_however_long_the_journal_is(tmp_path: Path) -> None:
    async with at_work(LocalFileSystem(), tmp_path) as journal:
        for n in range(60):
            await journal.append_record({"n": n, "data": bytes(1 << 20)})
    tracemalloc.start()
    assert sum(1 for _ in SegmentReader(LocalFileSystem(), tmp_path)) == 60
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20


async def three_lives(disk: InMemoryFileSystem, acked: list[int]) -> None:
    """Of a journal that meets a refusal, a failed fsync and cuts."""
    happens = {(1, 1): {"write": 2}, (1, 3): {"sync": 1}}
    for life in range(3):
        end = ended(disk)
        disk.make_directory(FOLDER)
        journal = Journal(disk, FOLDER, end)
        for turn in range(4):
            disk.full = happens.get((life, turn), {})
            if turn == 2:
                journal.start_segment()
            done = journal.append_record({"n": len(acked) + 1, "data": bytes(50)})
            while journal.has_pending:
                with contextlib.suppress(OSError):
                    journal.resolve_records(journal.commit_next())
            assert done.done()
            acked.append(len(acked) + 1)


@pytest.mark.parametrize("partial", [0.0, 0.3, 0.9, 1.0])
async def test_a_crash_at_any_call_keeps_acknowledged_records_and_no_others(partial: float) -> None:
    whole, everything = InMemoryFileSystem(), list[int]()
    await three_lives(whole, everything)
    calls = len(whole.log)
    assert read(whole) == everything == list(range(1, 13))
    for crash in range(1, calls + 1):
        disk, acked = InMemoryFileSystem(), list[int]()
        disk.partial, disk.crash_at = partial, crash
        with contextlib.suppress(CrashError):
            await three_lives(disk, acked)
        assert disk.crashed
        for kept, names in itertools.product((0.0, 0.5, 1.0), ("lost", "kept", "some")):
            left = read(disk.after_crash(kept, names=names, seed=crash, zeros=kept == 0.5))
            assert left == list(range(1, len(left) + 1)), (crash, kept, names)
            assert len(left) >= len(acked), (crash, kept, names)
