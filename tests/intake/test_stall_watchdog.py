"""What the watchdog says, by what there is to see, and when it says it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from learner.intake.coordinator.stall_watchdog import StallWatchdog, current_run_status
from learner.intake.monitoring.progress_clock import QUIET_SECONDS, ProgressClock
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.monitoring.stall_diagnosis import RunStatus, SamplerStatus, StalledPart, TrainerStatus, diagnose_stall
from tests.intake.builders import make_table
from tests.intake.process_harness import SamplerPeer
from tests.intake.server_harness import serve_intake
from tests.manual_clock import ManualClock
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.control import RunState

WAITS = TrainerStatus(has_connected=True, is_connected=True, is_waiting=True, seconds=4.0, step=12)
WORKS = TrainerStatus(has_connected=True, is_connected=True, seconds=310.0, step=12)
ASKS = RunStatus(trainer=WAITS, batch=8, ready_groups=3)
BUSY = SamplerStatus("s1", lease_seconds=200.0, demand=2)
STUCK = SamplerStatus(
    "s2", lease_seconds=90.0, demand=2, waiting_for="the retriever at http://r:1, which does not answer", waited_seconds=80.0
)

SEEN: dict[str, tuple[RunStatus, StalledPart, str]] = {
    "paused, whatever else is wrong": (
        RunStatus(RunState.PAUSED, state_seconds=600.0, blocked_seconds=3.0),
        StalledPart.OPERATOR,
        "the operator: the run has been paused for 10 min",
    ),
    "the disk": (
        RunStatus(blocked_seconds=70.0, journal_folder="run/journal"),
        StalledPart.DISK,
        "the disk, which has refused the journal run/journal for 70 s; free space on it, or repair it",
    ),
    "a disk without room to spare": (
        RunStatus(low_space_seconds=70.0, journal_folder="run/journal", trainer=WAITS),
        StalledPart.DISK,
        "the disk of run/journal, which has had no room to spare for 70 s; free space on it",
    ),
    "a trainer that never came": (
        RunStatus(trainer=TrainerStatus(seconds=75.0), samplers=[STUCK]),
        StalledPart.TRAINER,
        "the trainer, which has not come in the 75 s since the intake started",
    ),
    "a trainer that left": (
        RunStatus(trainer=TrainerStatus(has_connected=True, seconds=75.0, step=12), samplers=[BUSY], open_leases=1),
        StalledPart.TRAINER,
        "the trainer, which left 75 s ago, after step 12",
    ),
    "a trainer that holds up everybody": (
        RunStatus(trainer=WORKS, samplers=[SamplerStatus("s1", demand=4)], can_grant=False, ready_groups=8, batch=8),
        StalledPart.TRAINER,
        "the trainer, which has not asked for 5 min, at step 12; 8 of 8 groups are ready",
    ),
    "nobody is there": (
        replace(ASKS, no_sampler_seconds=90.0, last_seen=("s2", "s1")),
        StalledPart.SAMPLERS,
        "a sampler: none has been here for 90 s; the last to leave: s1 and s2",
    ),
    "nobody ever was": (replace(ASKS, no_sampler_seconds=90.0), StalledPart.SAMPLERS, "a sampler: none has been here for 90 s"),
    "all wait for a tool": (
        replace(
            ASKS,
            samplers=[STUCK, SamplerStatus("s3", demand=1, waiting_for=STUCK.waiting_for, waited_seconds=9.0)],
            open_leases=1,
        ),
        StalledPart.TOOLS,
        "the retriever at http://r:1, which does not answer: so say s2 and s3, for 80 s",
    ),
    "one waits for a tool and another works": (
        replace(ASKS, samplers=[STUCK, BUSY], open_leases=4),
        StalledPart.LEASES,
        "4 leases, out to s1 and s2, the oldest for 3 min; 3 of 8 groups are ready",
    ),
    "a silent sampler": (
        replace(ASKS, samplers=[BUSY, SamplerStatus("s9", silent_seconds=15.0, lease_seconds=300.0)], open_leases=2),
        StalledPart.LEASES,
        "2 leases, out to s1 and s9, the oldest for 5 min; nothing comes from s9; 3 of 8 groups are ready",
    ),
    "many samplers": (
        replace(ASKS, samplers=[SamplerStatus(f"s{n}", lease_seconds=1.0) for n in range(9)], open_leases=9),
        StalledPart.LEASES,
        "9 leases, out to s0, s1, s2 and 6 more, the oldest for 1 s; 3 of 8 groups are ready",
    ),
    "samplers that want nothing": (
        replace(ASKS, samplers=[SamplerStatus("s1")]),
        StalledPart.DEMAND,
        "s1 to want a lease; 3 of 8 groups are ready",
    ),
    "nothing is left to lease": (
        replace(ASKS, samplers=[SamplerStatus("s1", demand=2)], can_grant=False),
        StalledPart.GROUPS,
        "groups: 3 of 8 groups are ready, and nothing is out",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_the_deepest_cause_is_named(name: str) -> None:
    status, part, sentence = SEEN[name]
    found = diagnose_stall(status)
    assert (found.part, found.sentence) == (part, sentence)


def test_a_cause_is_the_same_however_long_it_takes() -> None:
    first, later = (
        diagnose_stall(RunStatus(trainer=WAITS, samplers=[SamplerStatus("s1", lease_seconds=held)], open_leases=1))
        for held in (60.0, 90.0)
    )
    assert first == later
    assert first.sentence != later.sentence
    assert first != diagnose_stall(RunStatus(trainer=WAITS, samplers=[SamplerStatus("s2", lease_seconds=90.0)], open_leases=1))


def test_a_pause_that_is_usual_for_the_run_is_no_stall() -> None:
    clock = ManualClock(1000.0)
    pace = ProgressClock(clock.monotonic)
    assert pace.stall_seconds == QUIET_SECONDS
    for _ in range(3):
        clock.now += 50.0
        pace.record_progress()
    assert pace.stall_seconds == 150.0
    clock.now += 100_000.0
    pace.record_progress()
    assert pace.stall_seconds == 450.0, "an outage does not make the next one usual"


def test_a_stall_is_logged_when_its_cause_changes_then_ever_less_often(tmp_path: Path) -> None:
    clock = ManualClock(1000.0)
    pace = ProgressClock(clock.monotonic)
    status = RunStatus(trainer=WAITS)
    recorder = RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=1)
    dog = StallWatchdog(pace, lambda: status, recorder)

    def said() -> list[tuple[str, int]]:
        path = tmp_path / "progress.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [(row["for"], row["seconds"]) for row in map(json.loads, lines)]

    def stalled(part: StalledPart) -> float | None:
        return recorder.metrics.registry.get_sample_value("treegrpo_stalled_seconds", {"waiting_for": part.value})

    begin = clock.now
    for seconds in range(0, 605, 5):
        clock.now = begin + seconds
        if seconds == 500:
            status = RunStatus(trainer=WAITS, samplers=[BUSY], open_leases=1)
        dog.check_stall()
    assert [seconds for _, seconds in said()] == [60, 120, 240, 480, 500]
    assert said()[0][0].startswith("a sampler")
    assert said()[-1][0].startswith("1 leases")
    assert (stalled(StalledPart.LEASES), stalled(StalledPart.SAMPLERS)) == (600.0, 0.0)
    pace.record_progress()
    dog.check_stall()
    assert (stalled(StalledPart.LEASES), len(said())) == (0.0, 5)


async def test_the_diagnosis_names_what_a_sampler_waits_for(tmp_path: Path) -> None:
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        with intake.trainer.track_connection(), intake.trainer.track_request():
            await sampler.set_demand(1)
            lease = await sampler.receive("lease")
            beat = pb.Heartbeat(waits_for="the retriever,\nwhich is away", waited_seconds=7.0)
            await sampler.send_request(heartbeat=beat)
            await intake.until(lambda: bool(intake.coordinator.open_sessions["s1"].waiting_for))
            status = current_run_status(intake.coordinator, intake.trainer, intake.journal)
            assert diagnose_stall(status).sentence == "the retriever, which is away: so say s1, for 7 s"
            await sampler.send_request(heartbeat=pb.Heartbeat())
            await intake.until(lambda: not intake.coordinator.open_sessions["s1"].waiting_for)
            assert (
                diagnose_stall(current_run_status(intake.coordinator, intake.trainer, intake.journal)).part is StalledPart.LEASES
            )
            before = intake.coordinator.leases.progress_clock.last_progress
            await sampler.send_chain(lease.id)
            await sampler.receive("ack")
            assert intake.coordinator.leases.progress_clock.last_progress > before
