"""Killed at any moment: what the next start finds is what happened, up to a point behind everything acknowledged."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.intake.crash_harness import CrashableIntake, History, play
from tests.intake.in_memory_filesystem import CrashError, InMemoryFileSystem
from treegrpo.core.lease import LeaseEndReason

LOST, FAILED = LeaseEndReason.LOST, LeaseEndReason.FAILED
GROUP = [("subtree", 0), ("subtree", 0), ("commit",), ("end", 0)]
FIRST: list[Any] = [
    *[("grant",)] * 4,
    *[("subtree", 0), ("subtree", 1), ("commit",), ("end", 1, LOST), ("grant",)],  # goes on with what it has
    *GROUP,
    *GROUP,
    *[("train",), ("evaluate",), ("grant",), ("grant",), ("subtree", 3), ("end", 3), ("commit",)],
    *[("grant",), ("subtree", 0), ("end", 0, FAILED), ("commit",)],
    *GROUP,
]
SECOND: list[Any] = [
    *GROUP,
    ("train",),
    ("grant",),
    ("grant",),
    *GROUP,
    *GROUP,
    ("train",),
    ("grant",),
    ("subtree", 0),
    ("commit",),
]
THIRD: list[Any] = [("fall_back",), ("grant",), *GROUP, ("train",), *GROUP, ("train",), ("train",), ("grant",), ("commit",)]


LIVES = (FIRST, SECOND, THIRD)


async def test_the_script_covers_every_case() -> None:
    disk, history = InMemoryFileSystem(), History()
    for script in LIVES:
        play(CrashableIntake(disk, history), script)
    last = CrashableIntake(disk, history)
    assert len(history.checkpoints) >= 4
    assert last.recovered.end.number > 5
    assert len(last.snapshots.snapshot_numbers()) == 2, "two generations"
    assert history.line[0][0] not in str(last.table.train_queue.kept_groups()), "something was forgotten"
    assert last.table.evaluation_answers.leaves


async def test_a_crash_at_any_file_system_call_is_recovered_from() -> None:
    disk, history, crashes = InMemoryFileSystem(), History(), 0
    for script in LIVES:
        whole, after = disk.after_crash(), history.copy()
        play(CrashableIntake(whole, after), script)
        for number, call in enumerate(whole.log, start=1):
            for partial in (0.0, 0.4, 1.0) if call == "write" else (0.0,):
                killed(disk.after_crash(), history.copy(), script, number, partial)
                crashes += 1
        disk, history = whole, after
    assert crashes > 150


def killed(disk: InMemoryFileSystem, history: History, script: list[Any], number: int, partial: float) -> None:
    """Crash at one call, and start again with whatever may be left."""
    disk.crash_at, disk.partial = number, partial
    with pytest.raises(CrashError):
        play(CrashableIntake(disk, history), script)
    process, then = disk.after_kill(), history.copy()
    CrashableIntake(process, then)  # has what no fsync has made durable, and counts on it from now on
    CrashableIntake(process.after_crash(), then)
    for names, kept, zeros in (("lost", 0.0, False), ("kept", 1.0, False), ("some", 0.5, bool(number % 2))):
        then = history.copy()
        left = disk.after_crash(kept, names=names, zeros=zeros, seed=number)
        machine = CrashableIntake(left, then)
        if names == "some":
            play(machine, SECOND)
            CrashableIntake(left, then)


HAPPENS = st.one_of(
    st.tuples(st.just("grant"), st.sampled_from(["s/1", "t/2"])),
    st.tuples(st.just("subtree"), st.integers(0, 5)),
    st.tuples(st.just("refuse"), st.integers(0, 5), st.integers(0, 3), st.sampled_from(["age", "prompt"])),
    st.tuples(st.just("end"), st.integers(0, 5), st.sampled_from(list(LeaseEndReason))),
    *(st.tuples(st.just(name)) for name in ("commit", "train", "train", "evaluate", "compact", "fall_back")),
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(HAPPENS, max_size=40), min_size=1, max_size=3),
    st.integers(1, 120),
    st.floats(0, 1),
    st.sampled_from(["lost", "kept", "some"]),
    st.booleans(),
)
async def test_recovery_after_random_events_and_a_crash(
    scripts: list[list[Any]], crash: int, kept: float, names: str, zeros: bool
) -> None:
    disk, history = InMemoryFileSystem(), History()
    disk.crash_at, disk.partial = crash, kept
    with contextlib.suppress(CrashError):
        for script in scripts:
            play(CrashableIntake(disk, history), script)
    left = disk.after_crash(kept, names=names, zeros=zeros, seed=crash)
    play(CrashableIntake(left, history), SECOND)
    CrashableIntake(left, history)
