from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from learner.intake.monitoring.recorder import MAX_DEPTH_LABEL, RunRecorder
from tests.intake.builders import PLAN, accept, chain, complete, grant, make_table, step
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.observability.metrics import IntakeMetrics

pytestmark = pytest.mark.pure


def make_recorder(tmp_path: Path) -> RunRecorder:
    return RunRecorder(IntakeMetrics(), tmp_path / "progress.jsonl", window=4)


def test_a_group_with_equal_rewards_counts_as_zero_signal(tmp_path: Path) -> None:
    table, recorder = make_table(), make_recorder(tmp_path)
    for rewards in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0)):
        lease = grant(table)
        for tree, reward in enumerate(rewards):
            accept(table, chain(lease, tree=tree, reward=reward))
        recorder.record_lease_end(table.end_lease(complete(lease)), complete(lease))
    assert recorder.metrics.registry.get_sample_value("treegrpo_groups_zero_signal_total") == 2


def test_a_lost_lease_is_counted_and_its_group_when_it_is_closed(tmp_path: Path) -> None:
    table, recorder = make_table(), make_recorder(tmp_path)
    lease = grant(table)
    accept(table, chain(lease))
    lost = LeaseEnd(lease, LeaseEndReason.LOST)
    recorder.record_lease_end(table.end_lease(lost), lost)
    sample = recorder.metrics.registry.get_sample_value
    assert sample("treegrpo_leases_ended_total", {"kind": "train", "reason": "lost"}) == 1
    assert sample("treegrpo_groups_closed_total", {"kind": "train", "reason": "lost"}) is None
    assert sample("treegrpo_rollout_unique_tokens_total", {"kind": "train"}) is None
    end = complete(grant(table))
    recorder.record_lease_end(table.end_lease(end), end)
    assert sample("treegrpo_groups_closed_total", {"kind": "train", "reason": "complete"}) == 1
    assert sample("treegrpo_rollout_unique_tokens_total", {"kind": "train"}) == 18
    assert sample("treegrpo_rollout_forgone_expansions_total", {"kind": "train"}) == PLAN.leaves - PLAN.trees


def test_prefix_tokens_are_counted_by_depth(tmp_path: Path) -> None:
    table, recorder = make_table(), make_recorder(tmp_path)
    lease = grant(table)
    subtree = chain(lease)
    accept(table, subtree)
    recorder.record_subtree(table.open_leases[lease], subtree)
    sample = recorder.metrics.registry.get_sample_value
    for depth, turn in enumerate(subtree.steps, 1):
        for how in ("cached", "prefilled"):
            labels = {"depth": str(depth), "how": how}
            assert sample("treegrpo_rollout_prefix_tokens_total", labels) == getattr(turn.cost, how)


def test_deep_turns_share_one_depth_label(tmp_path: Path) -> None:
    table, recorder = make_table(), make_recorder(tmp_path)
    group = table.open_leases[grant(table)]
    subtree = replace(chain(group.lease.id), steps=tuple(step(n, n - 1) for n in range(1, MAX_DEPTH_LABEL + 3)), leaves=())
    group.group.append_subtree(subtree)
    recorder.record_subtree(group, subtree)
    sample = recorder.metrics.registry.get_sample_value
    for how in ("cached", "prefilled"):
        counted = [
            sample("treegrpo_rollout_prefix_tokens_total", {"depth": str(n), "how": how}) for n in range(1, MAX_DEPTH_LABEL + 2)
        ]
        each = getattr(subtree.steps[0].cost, how)
        assert counted == [each] * (MAX_DEPTH_LABEL - 1) + [3 * each, None]


def test_the_first_lost_lease_shows_in_a_rate(tmp_path: Path) -> None:
    sample = make_recorder(tmp_path).metrics.registry.get_sample_value
    assert sample("treegrpo_leases_ended_total", {"kind": "train", "reason": "lost"}) == 0


def test_a_progress_line_has_the_ledger_totals(tmp_path: Path) -> None:
    table, recorder = make_table(), make_recorder(tmp_path)
    lease = grant(table)
    accept(table, chain(lease))
    recorder.record_lease_end(table.end_lease(complete(lease)), complete(lease))
    recorder.record_step({"step": 1}, table)
    line = json.loads((tmp_path / "progress.jsonl").read_text(encoding="utf-8"))
    tokens = line["ledger"]["train"]["tokens"]
    assert tokens["granted"] == tokens["spent"] + tokens["refunded"] + tokens["forfeited"] + tokens["outstanding"]
    assert (line["kind"], line["step"], line["saving"], line["saving_tool_calls"]) == ("step", 1, 0.0, 0.0)
    assert line["recomputed"] == 1 - 18 / 28


def test_progress_lines_on_a_full_disk_are_buffered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table, recorder = make_table(), make_recorder(tmp_path)
    (tmp_path / "progress.jsonl").mkdir()
    recorder.record_step({"step": 1}, table)
    assert "no line can be appended" in caplog.text
    (tmp_path / "progress.jsonl").rmdir()
    recorder.record_step({"step": 2}, table)
    lines = (tmp_path / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
