"""The audit finds what it is there to find: each test spoils one thing of a run that is in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.intake.leases.lease_table import LeaseTable
from learner.intake.persistence import lease_events
from learner.intake.wal.framing import Record, encode_frame, encode_record
from learner.intake.wal.segments import FORMAT, segment_path
from tests.chaos.audit import RunAudit, audit_run
from tests.chaos.run_records import JournalArchive, Row
from tests.intake.builders import accept, chain, complete, grant, make_table
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.v1 import rollout_pb2
from treegrpo.wire.codec import lease_end_from_pb, subtree_to_bytes

pytestmark = pytest.mark.pure

BATCH = 2


class AuditedRun:
    """A run of ``steps`` steps of two groups, made by a real lease table; what it wrote down is there to be spoiled."""

    def __init__(self, steps: int = 2) -> None:
        self.table: LeaseTable = make_table(batch=BATCH, total=steps * BATCH + 1)  # and room for another lease
        self.journal: list[Record] = []
        self.lines: list[Row] = []
        self.aside: list[Row] = []
        self.position = 0
        for step in range(1, steps + 1):
            draws = [self.roll_out() for _ in range(BATCH)]
            self.table.assign_positions(draws, [])
            self.journal.append(lease_events.positions_event(draws, []))
            self.train(step, draws)

    def roll_out(self) -> int:
        lease = grant(self.table)
        group = self.table.open_leases[lease]
        self.journal.append(lease_events.grant_event(group.lease, group.draw, group.holder))
        for tree in range(2):
            accept(self.table, chain(lease, tree))
            self.journal.append(lease_events.subtree_event(subtree_to_bytes(chain(lease, tree))))
        self.end(complete(lease))
        return group.draw

    def end(self, end: LeaseEnd) -> None:
        self.table.end_lease(end)
        self.journal.append(lease_events.lease_end_event(end))

    def train(self, step: int, draws: list[int]) -> None:
        self.position += len(draws)
        self.table.train_queue.mark_trained(self.position)
        row = {"step": step, "version": f"0.{step}", "position": self.position, "groups": len(draws), "groups_refused": 0}
        names = {"group_ids": [f"{draw:07d}" for draw in draws], "leaves": 2 * len(draws)}
        self.lines.append({"kind": "step", **row, **names, "ledger": self.table.ledger.summary()})

    def audit(self, folder: Path, *, ended: bool = True) -> RunAudit:
        journal, checkpoint = folder / "journal", folder / "checkpoints" / "step-000002"
        for made in (journal, checkpoint):
            made.mkdir(parents=True)
        header = encode_record({"format": FORMAT, "segment": 1, "after": 0})
        segment_path(journal, 1).write_bytes(
            encode_frame([header]) + encode_frame([encode_record(event) for event in self.journal])
        )
        (checkpoint / "progress.json").write_text(json.dumps({"position": self.position}))
        for name, rows in (("progress.jsonl", self.lines), ("set_aside.jsonl", self.aside)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return audit_run(folder, JournalArchive(journal, folder / "archive"), ended=ended)


def test_a_run_in_order_is_clean(tmp_path: Path) -> None:
    found = AuditedRun().audit(tmp_path)
    assert found.clean
    assert (found.trained, found.accounted.total(), found.unreported, found.step) == (4, 0, 0, 2)


def drop_a_group(run: AuditedRun) -> None:
    run.lines[1]["group_ids"] = run.lines[1]["group_ids"][:1]


def drop_leaves(run: AuditedRun) -> None:
    run.lines[0]["leaves"] -= 1


def skip_positions(run: AuditedRun) -> None:
    run.lines[1]["position"] += BATCH


def forget_a_draw(run: AuditedRun) -> None:
    lease = grant(run.table)
    group = run.table.open_leases[lease]
    run.journal.append(lease_events.grant_event(group.lease, group.draw, group.holder))
    run.end(LeaseEnd(lease, LeaseEndReason.LOST))


def leave_a_lease_open(run: AuditedRun) -> None:
    group = run.table.open_leases[grant(run.table)]
    run.journal.append(lease_events.grant_event(group.lease, group.draw, group.holder))


def leave_a_group_out_as_too_old(run: AuditedRun) -> None:
    run.journal.append(lease_events.positions_event([], [run.roll_out()]))


def train_beyond_the_journal(run: AuditedRun) -> None:
    run.position += 1


LOSSES = [
    drop_a_group,
    drop_leaves,
    skip_positions,
    forget_a_draw,
    leave_a_lease_open,
    leave_a_group_out_as_too_old,
    train_beyond_the_journal,
]


@pytest.mark.parametrize("spoil", LOSSES, ids=lambda spoil: spoil.__name__)
def test_what_is_lost_is_found(tmp_path: Path, spoil: Callable[[AuditedRun], None]) -> None:
    run = AuditedRun()
    spoil(run)
    assert run.audit(tmp_path).lost


def train_a_group_again(run: AuditedRun) -> None:
    run.lines[1]["group_ids"][0] = run.lines[0]["group_ids"][0]


def begin_too_early(run: AuditedRun) -> None:
    run.lines[1]["position"] -= 1


def accept_twice(run: AuditedRun) -> None:
    run.journal.insert(2, run.journal[1])


def end_twice(run: AuditedRun) -> None:
    ends = [event for event in run.journal if event["event"] == "ended"]
    assert lease_end_from_pb(rollout_pb2.LeaseEnd.FromString(ends[0]["end"])).reason is LeaseEndReason.COMPLETE
    run.journal.append(ends[0])


def give_twice(run: AuditedRun) -> None:
    run.journal.append(next(event for event in run.journal if event["event"] == "taken"))


@pytest.mark.parametrize(
    "spoil", [train_a_group_again, begin_too_early, accept_twice, end_twice, give_twice], ids=lambda spoil: spoil.__name__
)
def test_what_is_counted_twice_is_found(tmp_path: Path, spoil: Callable[[AuditedRun], None]) -> None:
    run = AuditedRun()
    spoil(run)
    assert run.audit(tmp_path).duplicated


@pytest.mark.parametrize("account", ["granted", "spent", "refunded", "forfeited", "outstanding"])
@pytest.mark.parametrize("currency", ["tokens", "tool_calls"])
def test_a_ledger_that_is_out_by_one_is_found(tmp_path: Path, account: str, currency: str) -> None:
    run = AuditedRun()
    run.lines[1]["ledger"]["train"][currency][account] += 1
    assert run.audit(tmp_path).unbalanced


def test_a_ledger_that_balances_but_is_not_the_journals_is_found(tmp_path: Path) -> None:
    run = AuditedRun()
    for account in ("granted", "spent"):
        run.lines[1]["ledger"]["train"]["tokens"][account] += 1
    (found,) = run.audit(tmp_path).unbalanced
    assert "the journal never led to its totals" in found


def test_a_draw_that_was_set_aside_is_accounted_for(tmp_path: Path) -> None:
    run = AuditedRun()
    forget_a_draw(run)
    run.aside.append({"draw": 4, "why": "lost"})
    found = run.audit(tmp_path)
    assert found.clean
    assert found.accounted == {"lost": 1, "refused by the trainer": 0}


def test_a_step_whose_record_is_missing_is_no_loss(tmp_path: Path) -> None:
    run = AuditedRun(steps=3)
    del run.lines[1]
    found = run.audit(tmp_path)
    assert found.clean
    assert (found.trained, found.unreported) == (6, 1)


def test_a_step_that_a_restart_has_orphaned_does_not_count(tmp_path: Path) -> None:
    run = AuditedRun()
    run.lines.append({**run.lines[1], "version": "1.2"})
    assert run.audit(tmp_path).clean


def test_while_a_run_goes_on_groups_may_be_on_their_way(tmp_path: Path) -> None:
    run = AuditedRun()
    leave_a_lease_open(run)
    assert run.audit(tmp_path, ended=False).clean
