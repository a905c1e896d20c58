"""Which groups train when: none beyond the staleness bound, none twice, none forgotten, whatever happens to its leases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.intake.coordinator.batcher import Batcher
from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from learner.intake.leases.staleness import FINISHING_SECONDS, count_groups_to_close
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.lease_events import replay_event
from tests.intake.builders import PLAN, MemoryEventLog, bound, chain, complete, kept, make_table
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseEnd, LeaseEndReason, LeaseKind
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import TreeError
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.wire.codec import subtree_to_pb

pytestmark = pytest.mark.pure

SLOTS = [(tree, index) for index in range(PLAN.branches) for tree in range(PLAN.trees)]
FAULTS = [LeaseEndReason.LOST, LeaseEndReason.FAILED, LeaseEndReason.RETURNED, LeaseEndReason.INTERRUPTED]


@dataclass
class TrainedRun:
    """A lease table at work, with a trainer that may go back and samplers that may do anything."""

    folder: Path
    batch: int
    max_lag: int
    total: int
    finishing_seconds: float = FINISHING_SECONDS
    lines: MemoryEventLog = field(default_factory=MemoryEventLog)
    position: int = 0
    lineage: int = 1
    trained: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """By position of the step: the draws it was given."""

    def __post_init__(self) -> None:
        self.table = self.empty_table()
        recorder = RunRecorder(IntakeMetrics(), self.folder / "progress.jsonl", window=2)
        self.leases = JournaledLeases(self.table, self.lines, recorder)
        self.batcher = Batcher(self.table, self.leases, bound(self.table, self.leases, self.finishing_seconds))
        self.publish()

    def empty_table(self) -> LeaseTable:
        return make_table(questions=7, batch=self.batch, max_lag=self.max_lag, total=self.total)

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion(self.lineage, self.position // self.batch)

    def publish(self) -> None:
        self.table.set_policy_version(self.version, self.position)

    def grant(self) -> None:
        """All there is to grant."""
        while (work := self.table.next_lease()) is not None:
            self.leases.grant_lease(*work, "s/1")

    def accept(self, group: RolloutGroup, *, fails: bool = False) -> None:
        """The next missing subtree, of the newest policy."""
        have = {(subtree.tree, subtree.index) for subtree in group.subtrees}
        missing = [slot for slot in SLOTS if slot not in have]
        if missing and group.state is GroupState.LEASED:
            tree, index = missing[0]
            try:
                sent = subtree_to_pb(chain(group.lease.id, tree, index, fails=fails, version=self.version))
                self.leases.record_subtree(group, sent)
            except TreeError as error:
                if (error.field, self.lineage) == ("age", 1):
                    raise AssertionError("a lease was too old, and the trainer never went back") from error
                if error.field != "age":
                    raise

    def step(self) -> bool:
        """The trainer asks, and learns from what it gets."""
        if self.position >= self.total:
            return False
        got = self.batcher.take_batch(self.position, self.batch)
        if not got:
            return False
        for group in got:
            oldest = min(s.version.step for part in kept(group) for one in part.steps for s in one.spans)
            assert self.version.step - oldest <= self.max_lag
        draws = [group.draw for group in got]
        assert self.trained.setdefault(self.position, draws) == draws, "a position is for ever"
        self.position += self.batch
        self.publish()
        return True

    def go_back(self, steps: int) -> None:
        self.position = max(0, self.position - steps * self.batch)
        self.lineage += 1
        self.publish()

    def replayed(self) -> LeaseTable:
        again = self.empty_table()
        recorder = RunRecorder(IntakeMetrics(), self.folder / "again.jsonl", window=2)
        for record in self.lines.records:
            replay_event(again, recorder, record)
        return again

    def check(self) -> None:
        for kind in LeaseKind:
            assert self.table.ledger.imbalance(kind) == Budget()
            assert self.table.ledger.outstanding(kind).tokens >= 0
        assert not self.table.set_aside_counts["stale"], "the limits never changed"
        draws = [draw for step in self.trained.values() for draw in step]
        assert len(draws) == len(set(draws))

    def finish(self) -> None:
        """Samplers that work from here on bring the run to its end."""
        for _ in range(50 * self.total):
            if self.position >= self.total:
                return
            self.grant()
            for group in list(self.table.open_leases.values()):
                for _ in SLOTS:
                    self.accept(group)
                self.leases.end_lease(complete(group.lease.id))
            self.step()
        pytest.fail("the run does not end")


def restorable(table: LeaseTable) -> Any:
    """What a restart has to bring back."""
    places = {
        "kept": table.train_queue.kept_groups(),
        "unfinished": table.unfinished_groups.values(),
        "open": table.open_leases.values(),
    }
    groups = {
        place: [(g.lease, g.snapshot_group(), [s.key for s in kept(g)]) for g in groups] for place, groups in places.items()
    }
    return table.snapshot_table(), groups


ACTIONS = ["grant", "accept", "fail", "close", "close", "fault", "step", "step", "back"]


@pytest.mark.parametrize("finishing_seconds", [0.0, float("inf")])
@given(
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 11)), min_size=20, max_size=60),
    st.integers(1, 2),
    st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_no_group_is_trained_beyond_the_bound(
    finishing_seconds: float, actions: list[tuple[str, int]], batch: int, max_lag: int
) -> None:
    with TemporaryDirectory() as folder:
        run = TrainedRun(Path(folder), batch, max_lag, total=5 * batch, finishing_seconds=finishing_seconds)
        for action, pick in actions:
            leases = list(run.table.open_leases.values())
            group = leases[pick % len(leases)] if leases else None
            match action, group:
                case "grant", _:
                    run.grant()
                case (("accept" | "fail"), RolloutGroup()):
                    run.accept(group, fails=action == "fail")
                case "close", RolloutGroup():
                    run.accept(group)
                    run.leases.end_lease(complete(group.lease.id))
                case "fault", RolloutGroup():
                    run.leases.end_lease(LeaseEnd(group.lease.id, FAULTS[pick % len(FAULTS)]))
                case "step", _:
                    run.step()
                case "back", _ if pick == 0:
                    run.go_back(2)
                case _:
                    pass
            run.check()
        assert restorable(run.replayed()) == restorable(run.table)
        run.finish()
        run.check()
        assert sum(len(draws) for draws in run.trained.values()) == run.total


def test_a_trainer_that_goes_back_makes_no_group_too_old(tmp_path: Path) -> None:
    """All parts were killed with the next groups half done, and the trainer has two steps to take again."""
    run = TrainedRun(tmp_path, batch=2, max_lag=1, total=8)
    for _ in range(2):
        run.grant()
        for group in list(run.table.open_leases.values())[:2]:
            run.accept(group)
            run.leases.end_lease(complete(group.lease.id))
        assert run.step()
    run.grant()
    for group in list(run.table.open_leases.values()):
        run.accept(group)
        run.leases.end_lease(LeaseEnd(group.lease.id, LeaseEndReason.INTERRUPTED))
    begun = {draw: group.min_policy_step for draw, group in run.table.unfinished_groups.items()}
    assert max(begun.values()) == 2
    run.go_back(2)
    run.grant()
    assert not run.table.open_leases, "the policy of step 0 goes on with nothing that a newer one has begun"
    run.step()
    run.grant()
    assert {group.draw: group.min_policy_step for group in run.table.open_leases.values()} == {
        d: age for d, age in begun.items() if age <= 1
    }
    run.finish()
    run.check()
    assert sorted(draw for step in run.trained.values() for draw in step) == [*range(8)]


def test_how_many_groups_have_to_close_by_hand() -> None:
    assert count_groups_to_close([0], [1, 1], base=1, batch=2, count=2, max_lag=1) == 1, "the 0 has no later step to go to"
    assert count_groups_to_close([0], [1, 1], base=1, batch=2, count=2, max_lag=2) == 0, "it has the next one"
    assert count_groups_to_close([0, 0, 0], [1, 1], base=1, batch=2, count=2, max_lag=2) == 1, "the next one has room for two"
    assert count_groups_to_close([0, 0, 0], [0, 1], base=1, batch=2, count=2, max_lag=2) == 1, "one of four goes now"
    assert count_groups_to_close([0, 0], [0, 0], base=1, batch=2, count=2, max_lag=2) == 0
    assert count_groups_to_close([5, 5], [5, 5], base=5, batch=2, count=2, max_lag=0) == 0
