from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from rich.console import Console

from tests.chaos.audit import RunAudit
from tests.chaos.driver import FaultOutcome
from tests.chaos.faults import Fault, FaultKind
from tests.chaos.report import ChaosReport, RewardTrend, outcome_table

pytestmark = pytest.mark.pure


def chaos_report(**found: Any) -> ChaosReport:
    outcome = FaultOutcome(Fault(FaultKind.KILL, ("trainer",), pause=0.0), recovery=3.21, started={"trainer": 2}, steps=4)
    return ChaosReport(7, [outcome], RunAudit(**found), Counter(trainer=2))


def test_the_last_line_is_json_with_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    chaos_report(lost=["a", "b"]).print_report(Console(stderr=True))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    counts = {"faults": 1, "lost": 2, "duplicated": 0, "unbalanced": 0, "max_recovery_s": 3.2, "seed": 7}
    assert counts.items() <= row.items()
    assert row["restarts"] == {"trainer": 2}


def test_the_table_says_what_became_of_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=120).print(outcome_table(chaos_report().outcomes))
    line = capsys.readouterr().out
    assert all(part in line for part in ("kill", "trainer", "3.2 s", "trainer 2×", "clean"))


@pytest.mark.parametrize("what", ["lost", "duplicated", "unbalanced"])
def test_anything_found_is_a_bad_end(what: str) -> None:
    assert chaos_report().passed
    assert not chaos_report(**{what: ["one"]}).passed


def test_only_a_reward_that_falls_beyond_chance_fails_the_run() -> None:
    for values, good in (([0.5, 0.4, 0.5, 0.3, 0.1, 0.1, 0.0, 0.1, 0.0], False), ([0.5, 0.1, 0.3] * 3, True)):
        assert chaos_report(chain=[{"reward_mean": value} for value in values]).passed is good


def test_thirds_are_compared_with_an_interval() -> None:
    assert RewardTrend.of([1.0, 2.0, 9.0, 9.0, 3.0, 5.0]) == RewardTrend(1.5, 4.0, 1.96 * math.sqrt(0.5 / 2 + 2.0 / 2))
    assert RewardTrend.of([1.0] * 5) is None
