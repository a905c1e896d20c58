"""Room that is kept for the journal: a full disk holds up new leases, and nothing that is under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from learner.intake.coordinator.batcher import Batcher
from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.wal.disk_reserve import NAME, RESERVE_BYTES, DiskReserve
from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import JournalEnd
from tests.intake.builders import bound, chain, complete, make_table
from tests.intake.in_memory_filesystem import InMemoryFileSystem
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.wire.codec import subtree_to_pb

pytestmark = pytest.mark.pure

FOLDER = Path("/run/journal")


@contextlib.asynccontextmanager
async def at_work(disk: InMemoryFileSystem) -> AsyncGenerator[Journal]:
    disk.make_directory(FOLDER)
    with Journal.open_journal(disk, FOLDER, JournalEnd(), backoff=Backoff((0.01,))) as journal:
        kept = DiskReserve(disk, journal, check_seconds=0.01)
        tasks = [asyncio.create_task(work) for work in (journal.commit_forever(), kept.maintain_forever())]
        yield journal
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(disk: InMemoryFileSystem, *, kept: bool) -> None:
    async with asyncio.timeout(10):
        while (FOLDER / NAME in disk.files) is not kept:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def fill(disk: InMemoryFileSystem) -> None:
    """Somebody else takes all that is free."""
    disk.size -= disk.free_bytes(FOLDER)


async def test_a_full_disk_still_takes_open_leases_and_positions() -> None:
    disk, table = InMemoryFileSystem(), make_table(batch=2, max_lag=3)
    async with at_work(disk) as journal:
        leases = JournaledLeases(table, journal, RunRecorder(IntakeMetrics(), Path("/dev/null"), window=2))
        batcher = Batcher(table, leases, bound(table, leases))
        while (work := table.next_lease()) is not None:
            leases.grant_lease(*work, "s/1")
        groups = list(table.open_leases.values())[:6]
        for group in groups[:4]:
            leases.record_subtree(group, subtree_to_pb(chain(group.lease.id)))
            leases.end_lease(complete(group.lease.id))
        await journal.durable_so_far()
        await until(disk, kept=True)
        assert journal.low_space_since is None
        fill(disk)
        for position in (0, 2):
            assert len(batcher.take_batch(position, 2)) == 2
            async with asyncio.timeout(5):
                await leases.positions_durable
        assert (journal.blocked, journal.low_space_since is None) == (False, False)
        late = [leases.record_subtree(group, subtree_to_pb(chain(group.lease.id))) for group in groups[4:]]
        async with asyncio.timeout(5):
            await asyncio.gather(*late)
        disk.size += 3 * RESERVE_BYTES
        await until(disk, kept=True)
        async with asyncio.timeout(5):
            while journal.low_space_since is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_a_disk_without_its_reserve_refuses_and_loses_nothing() -> None:
    disk = InMemoryFileSystem()
    async with at_work(disk) as journal:
        await journal.append_record({"n": 0})
        await until(disk, kept=True)
        fill(disk)
        large = [journal.append_record({"n": n, "data": bytes(1 << 20)}) for n in range(1, 25)]
        async with asyncio.timeout(10):
            while not journal.blocked:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert 0 < sum(done.done() for done in large) < len(large)
        disk.size += 4 * RESERVE_BYTES
        async with asyncio.timeout(10):
            await asyncio.gather(*large)


async def test_a_reserve_takes_room_on_a_real_disk_and_gives_it_back(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    file = folder / NAME
    with Journal.open_journal(LocalFileSystem(), folder, JournalEnd()) as journal:
        kept = DiskReserve(LocalFileSystem(), journal)
        keeping = asyncio.create_task(kept.maintain_forever())
        async with asyncio.timeout(10):
            while not file.exists() or file.stat().st_blocks * 512 < RESERVE_BYTES:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            while not journal.on_disk_full():  # noqa: ASYNC110  # once the file is flushed, the reserve is held, and released here
                await asyncio.sleep(0.001)
        assert not file.exists()
        assert not journal.on_disk_full(), "there is no more"
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
