from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.intake.monitoring.progress_log import ProgressLog

pytestmark = pytest.mark.pure


def step(number: int, lineage: int = 0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "version": f"{lineage}.{number}", "position": 2 * number}


def versions(path: Path) -> list[str]:
    return [json.loads(line)["version"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_repeated_progress_record_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    first = ProgressLog(path)
    for row in (step(1), step(1), step(2)):
        first.append_row(row)
    second = ProgressLog(path)
    for row in (step(1), step(2), step(2, lineage=1), step(3, lineage=1), {"kind": "eval", "version": "1.3"}):
        second.append_row(row)
    second.append_row({"kind": "eval", "version": "1.3"})
    assert versions(path) == ["0.1", "0.2", "1.2", "1.3", "1.3"]


def test_a_torn_progress_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    for row in (step(1), step(2)):
        ProgressLog(path).append_row(row)
    path.write_bytes(path.read_bytes()[:-9])
    again = ProgressLog(path)
    assert versions(path) == ["0.1"]
    for row in (step(1), step(2)):
        again.append_row(row)
    assert versions(path) == ["0.1", "0.2"]


def test_a_record_of_a_repeating_kind_is_written_each_time(tmp_path: Path) -> None:
    file = ProgressLog(tmp_path / "progress.jsonl")
    for _ in range(2):
        file.append_row({"kind": "waiting", "for": "a sampler", "version": ""})
    assert len(versions(tmp_path / "progress.jsonl")) == 2
