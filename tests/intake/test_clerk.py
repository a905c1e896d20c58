from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.intake.coordinator.journaled_leases import Clerk
from learner.intake.leases.lease_table import LeaseBook
from learner.intake.leases.question_queue import QuestionQueue
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence import lease_events
from learner.intake.persistence.snapshot import StateCapture
from learner.intake.wal.framing import Record
from tests.intake.builders import PLAN, VERSION, VOCABULARY, book, chain, complete, question
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.net.limits import MESSAGE_BYTES, SENTENCE_CHARACTERS
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.wire.codec import lease_end_to_pb, subtree_from_pb, subtree_to_bytes, subtree_to_pb


class Lines:
    """A journal that is a list."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def append_record(self, record: bytes) -> asyncio.Future[int]:
        self.records.append(msgpack.unpackb(record))
        return self.durable_so_far()

    def durable_so_far(self) -> asyncio.Future[int]:
        return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("failing", ["record_subtree", "record_lease_end"])
async def test_a_report_that_fails_does_not_part_the_journal_from_the_book(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, lines, reporter = book(), Lines(), RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=2)
    clerk = Clerk(made, lines, reporter)
    work = made.next_lease()
    assert work is not None
    lease = clerk.grant(*work, "s/1").id

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(reporter, failing, fail)
    if failing == "record_subtree":
        with pytest.raises(ZeroDivisionError):
            clerk.accept(subtree_to_pb(chain(lease)))
    else:
        clerk.accept(subtree_to_pb(chain(lease)))
        with pytest.raises(ZeroDivisionError):
            clerk.end(complete(lease))
    again = book()
    for record in lines.records:
        lease_events.replay(again, RunRecorder(IntakeMetrics(), tmp_path / "again.jsonl", window=2), record)
    assert (again.ledger.summary(), again.groups.closed) == (made.ledger.summary(), made.groups.closed)


def described(made: LeaseBook, reporter: RunRecorder) -> list[Record]:
    return list(StateCapture(made, reporter).iter_records())


def with_questions(sources: list[str]) -> LeaseBook:
    questions = [replace(question(i), source=source) for i, source in enumerate(sources)]
    made = LeaseBook(QuestionQueue(questions, seed=0), PLAN, seed=0, batch=2, max_lag=1, total=9, vocabulary=VOCABULARY, mark="t")
    made.version = VERSION
    return made


TEXTS = st.text(max_size=3) | st.sampled_from(["\ud800", "a\udfffb", "\ud83d\ude00"])
EVENTS = st.lists(st.tuples(st.sampled_from(["grant", "accept", "refuse", "end", "close", "give"]), TEXTS), max_size=12)


def happens(clerk: Clerk, made: LeaseBook, kind: str, text: str) -> None:
    """One event, with ``text`` wherever it has a string."""
    lease = next(iter(made.open), "")
    match kind:
        case "grant" if (work := made.next_lease()) is not None:
            clerk.grant(*work, f"s/{text}")
        case "accept" if lease and not made.open[lease].closed:
            clerk.accept(subtree_to_pb(chain(lease, tree=len(made.open[lease].group.trees) % PLAN.trees)))
        case "refuse" if lease:
            clerk.refuse(lease, (0, 1), Cost(), text, text)
        case "end" if lease:
            clerk.end(LeaseEnd(lease, LeaseEndReason.FAILED, error=text))
        case "close" if lease and not made.open[lease].closed:
            clerk.close(made.open[lease].draw)
        case "give":
            clerk.give([group.draw for group in made.groups.ready], [])
        case _:
            pass  # not now


@given(sources=st.lists(TEXTS, min_size=3, max_size=3), script=EVENTS)
def test_what_cannot_be_written_down_changes_nothing(
    sources: list[str], script: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("clerk")
    made, again, lines = with_questions(sources), with_questions(sources), Lines()

    async def run() -> None:
        reporter = RunRecorder(IntakeMetrics(), folder / "progress.jsonl", window=2)
        clerk = Clerk(made, lines, reporter)
        for kind, text in script:
            before, written = copy.deepcopy(described(made, reporter)), len(lines.records)
            try:
                happens(clerk, made, kind, text)
            except UnicodeEncodeError:
                assert (described(made, reporter), len(lines.records)) == (before, written)
        reader = RunRecorder(IntakeMetrics(), folder / "again.jsonl", window=2)
        for record in lines.records:
            lease_events.replay(again, reader, record)
        assert described(again, reader)[0]["book"] == described(made, reporter)[0]["book"]

    asyncio.run(run())


async def test_a_lease_beyond_a_record_is_still_the_next_one(tmp_path: Path) -> None:
    made, lines = with_questions(["x" * (MESSAGE_BYTES + (2 << 20)), "small"]), Lines()
    clerk = Clerk(made, lines, RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=2))
    large = next(work for _ in range(2) if (work := made.next_lease()) is not None)
    if large[0].question.source == "small":
        clerk.grant(*large, "s/1")
    work = made.next_lease()
    assert work is not None
    with pytest.raises(ValueError, match="larger than the limit"):
        clerk.grant(*work, "s/1")
    assert made.next_lease() == work
    assert len(lines.records) == len(made.open)


def test_what_tools_and_errors_say_can_always_be_sent() -> None:
    end = lease_end_to_pb(LeaseEnd("lease", LeaseEndReason.FAILED, error="a\ud800b" + "x" * 9999))
    assert end.error.startswith("a\ufffdb")
    assert len(end.error) == SENTENCE_CHARACTERS
    made = chain("lease")
    odd = replace(made, steps=tuple(replace(step, tool="\udfff", tool_arguments="\ud83d\ude00") for step in made.steps))
    step = subtree_from_pb(type(subtree_to_pb(odd)).FromString(subtree_to_bytes(odd))).steps[0]
    assert (step.tool, step.tool_arguments) == ("\ufffd", "\U0001f600")
