"""The coordinator by itself, with a journal that keeps nothing and a control plane that says what it is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from learner.intake.coordinator.coordinator import Coordinator
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.run_lock import lock_run
from tests.intake.builders import PLAN, VERSION, accept, chain, complete, make_table
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import AddressInUseError
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.control import ControlPlane, RunState

pytestmark = pytest.mark.pure


class FakeControl:
    state = RunState.RUNNING


class NullJournal:
    blocked, low_space_since, backlog = False, None, 0

    def __init__(self) -> None:
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._done.set_result(1)

    def append_record(self, _: Any) -> asyncio.Future[int]:
        return self._done

    def durable_so_far(self) -> asyncio.Future[int]:
        return self._done


def make_coordinator(table: LeaseTable, control: FakeControl, folder: Path) -> Coordinator:
    return Coordinator(
        *(table, cast("Any", NullJournal()), cast("ControlPlane", control)),
        RunRecorder(IntakeMetrics(), folder / "progress.jsonl", window=1),
        run="test",
        plan=PLAN,
        heldout=0,
    )


async def test_a_sampler_is_welcomed_before_it_is_asked_to_stop(tmp_path: Path) -> None:
    table, control = make_table(batch=1, max_lag=2), FakeControl()
    table.version = VERSION
    coordinator = make_coordinator(table, control, tmp_path)
    hello = pb.Hello(sampler="s", incarnation=1, engine="e", capacity=4)
    session = coordinator.join_sampler(hello)
    coordinator.set_demand(session, 3)
    coordinator.dispatcher.dispatch_leases()
    heard, unheard, done = list(table.open_leases)
    coordinator.leave_sampler(session)
    accept(table, chain(done))
    table.end_lease(complete(done))
    control.state, table.version = RunState.PAUSED, PolicyVersion(1, 2)  # the batch that is ready waits for the other two
    hello.leases.append(heard)
    back = coordinator.join_sampler(hello)
    coordinator.staleness.enforce_bound()
    said = [cast("pb.RolloutResponse", back.outbox.get_nowait()) for _ in range(back.outbox.qsize())]
    kinds = [message.WhichOneof("kind") for message in said]
    assert kinds == ["welcome", "stop_expanding"]
    assert unheard not in table.open_leases


async def test_the_dispatch_task_grants_when_it_is_woken_and_the_run_goes_on(tmp_path: Path) -> None:
    table, control = make_table(batch=2, max_lag=1), FakeControl()
    coordinator = make_coordinator(table, control, tmp_path)
    session = coordinator.join_sampler(pb.Hello(sampler="s", incarnation=1, engine="e", capacity=4))
    dispatching = asyncio.create_task(coordinator.dispatcher.dispatch_forever())
    for state, demand, granted in (
        (RunState.RUNNING, 1, 1),
        (RunState.PAUSED, 3, 1),
        (RunState.RUNNING, 2, 2),
        (RunState.RUNNING, 9, 4),
    ):
        control.state = state
        coordinator.set_demand(session, demand)
        for _ in range(3):  # the task is woken, and runs
            await asyncio.sleep(0)
        assert len(table.open_leases) == granted, "at most (max_lag + 1) · batch"
    dispatching.cancel()


@pytest.mark.parametrize("now", [{"max_lag": 0}, {"total": 2}])
def test_what_was_begun_goes_on_though_the_bound_was_lowered_meanwhile(now: dict[str, int]) -> None:
    """Two restarts apart, ``train.max_lag`` and ``train.steps`` may change."""
    before = make_table(batch=2, max_lag=3, total=8)
    leases: list[str] = []
    while (work := before.next_lease()) is not None:
        leases.append(before.grant_lease(*work, "s/1", now=0.0).lease.id)
    for lease in leases:
        accept(before, chain(lease))
        before.end_lease(LeaseEnd(lease, LeaseEndReason.INTERRUPTED))
    after = make_table(**({"batch": 2, "max_lag": 3, "total": 8} | now))
    state = before.snapshot_table()
    after.restore_table(
        state, leased=[], unfinished=list(before.unfinished_groups.values()), kept=before.train_queue.kept_groups()
    )
    again = 0
    while (work := after.next_lease()) is not None:
        after.grant_lease(*work, "s/1", now=0.0)
        again += 1
    assert again == len(leases) == 8


def test_a_run_has_one_intake(tmp_path: Path) -> None:
    said = r"Another intake works on the run in .*; stop it, or set run\.dir"
    with lock_run(tmp_path), pytest.raises(AddressInUseError, match=said), lock_run(tmp_path):
        raise AssertionError("there are two")
    with lock_run(tmp_path):
        pass
