from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.question_queue import QuestionQueue
from learner.intake.leases.rollout_group import GroupState
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence import lease_events
from learner.intake.persistence.snapshot import StateCapture
from learner.intake.wal.framing import Record
from tests.intake.builders import PLAN, VERSION, VOCABULARY, MemoryEventLog, chain, complete, make_table, question
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.net.limits import MESSAGE_BYTES, SENTENCE_CHARACTERS
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.wire.codec import lease_end_to_pb, subtree_from_pb, subtree_to_bytes, subtree_to_pb

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("failing", ["record_subtree", "record_lease_end"])
async def test_a_recorder_that_fails_does_not_part_journal_and_table(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, lines, recorder = make_table(), MemoryEventLog(), RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=2)
    leases = JournaledLeases(table, lines, recorder)
    work = table.next_lease()
    assert work is not None
    lease = leases.grant_lease(*work, "s/1").id

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(recorder, failing, fail)
    group, sent = table.open_leases[lease], subtree_to_pb(chain(lease))
    if failing == "record_subtree":
        with pytest.raises(ZeroDivisionError):
            leases.record_subtree(group, sent)
    else:
        leases.record_subtree(group, sent)
        with pytest.raises(ZeroDivisionError):
            leases.end_lease(complete(lease))
    again = make_table()
    for record in lines.records:
        lease_events.replay_event(again, RunRecorder(IntakeMetrics(), tmp_path / "again.jsonl", window=2), record)
    assert (again.ledger.summary(), again.train_queue.closed_count) == (table.ledger.summary(), table.train_queue.closed_count)


def described(table: LeaseTable, recorder: RunRecorder) -> list[Record]:
    return list(StateCapture(table, recorder).iter_records())


def with_questions(sources: list[str]) -> LeaseTable:
    questions = [replace(question(i), source=source) for i, source in enumerate(sources)]
    table = LeaseTable(
        QuestionQueue(questions, seed=0), PLAN, seed=0, batch=2, max_lag=1, total=9, vocabulary=VOCABULARY, mark="t"
    )
    table.version = VERSION
    return table


TEXTS = st.text(max_size=3) | st.sampled_from(["\ud800", "a\udfffb", "\ud83d\ude00"])
EVENTS = st.lists(st.tuples(st.sampled_from(["grant", "accept", "refuse", "end", "close", "give"]), TEXTS), max_size=12)


def apply_event(leases: JournaledLeases, table: LeaseTable, kind: str, text: str) -> None:
    """One event, with ``text`` wherever it has a string."""
    group = next(iter(table.open_leases.values()), None)
    match kind:
        case "grant" if (work := table.next_lease()) is not None:
            leases.grant_lease(*work, f"s/{text}")
        case "accept" if group and group.state is GroupState.LEASED:
            leases.record_subtree(group, subtree_to_pb(chain(group.lease.id, tree=len(group.group.trees) % PLAN.trees)))
        case "refuse" if group:
            leases.reject_subtree(group, (0, 1), Cost(), text, text)
        case "end" if group:
            leases.end_lease(LeaseEnd(group.lease.id, LeaseEndReason.FAILED, error=text))
        case "close" if group and group.state is GroupState.LEASED:
            leases.close_group(group.draw)
        case "give":
            leases.assign_positions([group.draw for group in table.train_queue.ready_groups], [])
        case _:
            pass  # not now


@given(sources=st.lists(TEXTS, min_size=3, max_size=3), script=EVENTS)
def test_what_cannot_be_written_down_changes_nothing(
    sources: list[str], script: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("leases")
    table, again, lines = with_questions(sources), with_questions(sources), MemoryEventLog()

    async def run() -> None:
        recorder = RunRecorder(IntakeMetrics(), folder / "progress.jsonl", window=2)
        leases = JournaledLeases(table, lines, recorder)
        for kind, text in script:
            before, written = copy.deepcopy(described(table, recorder)), len(lines.records)
            try:
                apply_event(leases, table, kind, text)
            except UnicodeEncodeError:
                assert (described(table, recorder), len(lines.records)) == (before, written)
        reader = RunRecorder(IntakeMetrics(), folder / "again.jsonl", window=2)
        for record in lines.records:
            lease_events.replay_event(again, reader, record)
        assert described(again, reader)[0]["book"] == described(table, recorder)[0]["book"]

    asyncio.run(run())


async def test_a_lease_too_large_for_a_record_is_still_the_next_one(tmp_path: Path) -> None:
    table, lines = with_questions(["x" * (MESSAGE_BYTES + (2 << 20)), "small"]), MemoryEventLog()
    leases = JournaledLeases(table, lines, RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=2))
    large = next(work for _ in range(2) if (work := table.next_lease()) is not None)
    if large[0].question.source == "small":
        leases.grant_lease(*large, "s/1")
    work = table.next_lease()
    assert work is not None
    with pytest.raises(ValueError, match="larger than the limit"):
        leases.grant_lease(*work, "s/1")
    assert table.next_lease() == work
    assert len(lines.records) == len(table.open_leases)


def test_what_tools_and_errors_say_can_always_be_sent() -> None:
    end = lease_end_to_pb(LeaseEnd("lease", LeaseEndReason.FAILED, error="a\ud800b" + "x" * 9999))
    assert end.error.startswith("a\ufffdb")
    assert len(end.error) == SENTENCE_CHARACTERS
    table = chain("lease")
    odd = replace(table, steps=tuple(replace(step, tool="\udfff", tool_arguments="\ud83d\ude00") for step in table.steps))
    step = subtree_from_pb(type(subtree_to_pb(odd)).FromString(subtree_to_bytes(odd))).steps[0]
    assert (step.tool, step.tool_arguments) == ("\ufffd", "\U0001f600")
