from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from learner.intake import events
from learner.intake.clerk import Clerk
from learner.intake.frames import Record
from learner.intake.report import Reporter
from tests.intake.builders import book, chain, complete
from treegrpo.codec import subtree_to_pb
from treegrpo.telemetry import IntakeMetrics


class Lines:
    """A journal that is a list."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def append(self, record: Record) -> asyncio.Future[int]:
        self.records.append(record)
        return self.barrier()

    def barrier(self) -> asyncio.Future[int]:
        return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("failing", ["accepted", "ended"])
async def test_a_report_that_fails_does_not_part_the_journal_from_the_book(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, lines, reporter = book(), Lines(), Reporter(IntakeMetrics(), tmp_path / "progress.jsonl", window=2)
    clerk = Clerk(made, lines, reporter)
    work = made.next_lease()
    assert work is not None
    lease = clerk.grant(*work, "s/1").id

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(reporter, failing, fail)
    if failing == "accepted":
        with pytest.raises(ZeroDivisionError):
            clerk.accept(subtree_to_pb(chain(lease)))
    else:
        clerk.accept(subtree_to_pb(chain(lease)))
        with pytest.raises(ZeroDivisionError):
            clerk.end(complete(lease))
    again = book()
    for record in lines.records:
        events.replay(again, Reporter(IntakeMetrics(), tmp_path / "again.jsonl", window=2), record)
    assert (again.ledger.summary(), again.groups.closed) == (made.ledger.summary(), made.groups.closed)
