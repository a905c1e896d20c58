"""The desk by itself, with a journal that keeps nothing and a control plane that says what it is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from learner.intake.coordinator.coordinator import Desk
from learner.intake.leases.lease_table import LeaseBook
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.run_lock import lock_run
from tests.intake.builders import PLAN, VERSION, book, chain, complete
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import AddressInUseError
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.control import ControlPlane, RunState


class Told:
    state = RunState.RUNNING


class Forgetful:
    blocked, low_space_since, backlog_bytes = False, None, 0

    def __init__(self) -> None:
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._done.set_result(1)

    def append_record(self, _: Any) -> asyncio.Future[int]:
        return self._done

    def durable_so_far(self) -> asyncio.Future[int]:
        return self._done


def desk(made: LeaseBook, told: Told, folder: Path) -> Desk:
    return Desk(
        *(made, cast("Any", Forgetful()), cast("ControlPlane", told)),
        RunRecorder(IntakeMetrics(), folder / "progress.jsonl", window=1),
        run="test",
        plan=PLAN,
        heldout=0,
    )


async def test_a_sampler_that_comes_back_is_welcomed_before_it_is_told_to_stop(tmp_path: Path) -> None:
    made, told = book(batch=1, max_lag=2), Told()
    made.version = VERSION
    at = desk(made, told, tmp_path)
    hello = pb.Hello(sampler="s", incarnation=1, engine="e", capacity=4)
    peer = at.join(hello)
    at.demand(peer, 3)
    heard, unheard, done = list(made.open)
    at.leave(peer)
    made.accept(chain(done))
    made.ended(complete(done))
    told.state, made.version = RunState.PAUSED, PolicyVersion(1, 2)  # the batch that is ready waits for the other two
    hello.leases.append(heard)
    back = at.join(hello)
    said = [cast("pb.RolloutResponse", back.outbox.get_nowait()) for _ in range(back.outbox.qsize())]
    kinds = [message.WhichOneof("kind") for message in said]
    assert kinds == ["welcome", "stop_expanding"]
    assert unheard not in made.open


@pytest.mark.parametrize("now", [{"max_lag": 0}, {"total": 2}])
def test_what_was_begun_goes_on_though_the_bound_was_lowered_meanwhile(now: dict[str, int]) -> None:
    """Two restarts apart, ``train.max_lag`` and ``train.steps`` may change."""
    before = book(batch=2, max_lag=3, total=8)
    leases: list[str] = []
    while (work := before.next_lease()) is not None:
        leases.append(before.granted(*work, "s/1", now=0.0).lease.id)
    for lease in leases:
        before.accept(chain(lease))
        before.ended(LeaseEnd(lease, LeaseEndReason.INTERRUPTED))
    after = book(**({"batch": 2, "max_lag": 3, "total": 8} | now))
    state = before.state()
    after.restore(state, open_=[], unfinished=list(before.unfinished.values()), kept=before.groups.kept())
    again = 0
    while (work := after.next_lease()) is not None:
        after.granted(*work, "s/1", now=0.0)
        again += 1
    assert again == len(leases) == 8


def test_a_run_has_one_intake(tmp_path: Path) -> None:
    said = r"Another intake works on the run in .*; stop it, or set run\.dir"
    with lock_run(tmp_path), pytest.raises(AddressInUseError, match=said), lock_run(tmp_path):
        raise AssertionError("there are two")
    with lock_run(tmp_path):
        pass
