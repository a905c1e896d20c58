from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from learner.intake.journal import Journal, read
from treegrpo.errors import JournalError


async def write(path: Path, records: list[dict[str, object]]) -> None:
    _, size = read(path)
    with Journal.open(path, size) as journal:
        writer = asyncio.create_task(journal.write_forever())
        await asyncio.gather(*(journal.append(record) for record in records))
        writer.cancel()


async def test_what_was_acknowledged_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    await write(path, [{"n": 1}, {"n": 2}])
    await write(path, [{"n": 3}])
    assert [record["n"] for record in read(path)[0]] == [1, 2, 3]


@pytest.mark.parametrize("lost", range(1, 20))
async def test_a_torn_tail_is_cut_and_the_rest_kept(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "journal"
    await write(path, [{"n": 1}, {"text": "x" * 20}])
    path.write_bytes(path.read_bytes()[:-lost])
    await write(path, [{"n": 3}])
    assert [record.get("n") for record in read(path)[0]] == [1, 3]


async def test_a_flipped_bit_ends_the_journal_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    await write(path, [{"n": 1}, {"n": 2}])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [record["n"] for record in read(path)[0]] == [1]


async def test_what_is_pending_at_the_end_is_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal.open(path, 0) as journal:
        journal.append({"n": 1})
    assert [record["n"] for record in read(path)[0]] == [1]


async def test_a_disk_that_refuses_fails_every_waiting_append(tmp_path: Path) -> None:
    with Path("/dev/full").open("ab", buffering=0) as full:  # noqa: ASYNC230
        journal = Journal(full)
        writer = asyncio.create_task(journal.write_forever())
        with pytest.raises(JournalError, match="make room"):
            await journal.append({"n": 1})
        with pytest.raises(JournalError):
            await writer
    assert read(tmp_path / "nothing") == ([], 0)


async def test_a_commit_under_way_at_the_end_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, syncing, go_on = tmp_path / "journal", threading.Event(), threading.Event()
    sync = os.fsync

    def slow(descriptor: int) -> None:
        syncing.set()
        go_on.wait(10)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with Journal.open(path, 0) as journal:
        writer = asyncio.create_task(journal.write_forever())
        journal.append({"n": 1})
        await asyncio.to_thread(syncing.wait, 10)
        writer.cancel()
        journal.append({"n": 2})
        go_on.set()
    assert [record["n"] for record in read(path)[0]] == [1, 2]
