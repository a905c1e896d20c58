"""Records what the intake does: its metrics, and a line of the run's progress file for each step and evaluation."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from learner.intake.leases.evaluation import EvaluationRound
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.question_give_up import was_given_up
from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from learner.intake.leases.subtree_validation import TOO_LATE_REASONS
from learner.intake.monitoring.progress_log import ProgressLog
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import SUFFIX
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseEnd, LeaseKind
from treegrpo.core.step import Subtree
from treegrpo.observability.metrics import IntakeMetrics

log = logging.getLogger(__name__)
SET_ASIDE_REASONS = {
    "overdue": "the staleness bound was reached before its first leaf",
    "stale": "it is older than train.max_lag allows",
}
"""Sentences for groups that are set aside for another reason than the end of a lease."""
CURRENCIES = ("tokens", "tool_calls")
MAX_DEPTH_LABEL = 8
"""Depths from the root that have a label of their own; deeper turns are counted under this one."""
REPLAYED_COUNTERS = (
    "tokens",
    "prefix",
    "leaves",
    "failed_steps",
    "ended",
    "groups",
    "set_aside",
    "forgone",
    "zero_signal",
    "unique",
    "chain",
)
"""The counters that only events of the journal change."""


class RunRecorder:
    def __init__(self, metrics: IntakeMetrics, progress: Path, window: int) -> None:
        """``window``: groups that a mean is taken over."""
        self.metrics = metrics
        self._progress = ProgressLog(progress)
        self._set_aside_log = ProgressLog(progress.with_name("set_aside.jsonl"))
        self._recent_means = {kind: deque[tuple[float, float]](maxlen=window) for kind in LeaseKind}
        self._spent = {kind: Budget() for kind in LeaseKind}
        self._chain = {kind: Budget() for kind in LeaseKind}
        self._needed = {kind: Budget() for kind in LeaseKind}
        self._samplers = 0
        self._counted: dict[tuple[LeaseKind, str, str], int] = {}
        self._labelled: dict[tuple[Counter, tuple[str, ...]], Counter] = {}

    def export_lease_table(self, table: LeaseTable) -> None:
        """Update the metrics of ledger and leases at each scrape."""
        self.metrics.refresh = lambda: self._refresh(table)

    def export_journal(self, journal: Journal) -> None:
        """Read the metrics of the journal at each scrape."""
        self.metrics.journal_blocked.set_function(lambda: journal.blocked)
        self.metrics.journal_short.set_function(lambda: journal.low_space_since is not None)
        self.metrics.journal_bytes.set_function(lambda: _segment_bytes(journal.folder))
        self.metrics.journal_free.set_function(lambda: _free_bytes(journal.folder))

    def _labels(self, counter: Counter, *labels: str) -> Counter:
        """``counter.labels``, cached: that call takes longer than all other work of `record_subtree`."""
        found = self._labelled.get((counter, labels))
        if found is None:
            found = self._labelled[(counter, labels)] = counter.labels(*labels)
        return found

    def record_samplers(self, count: int, aside: int) -> None:
        """``count`` samplers have an open stream; ``aside`` of them are put aside by the circuit breaker."""
        self._samplers = count
        self.metrics.samplers.set(count)
        self.metrics.put_aside.set(aside)

    def record_rejection(self, reason: str, leaves: int) -> None:
        """Count a rejected subtree. ``reason``: "lease" or "overdue" if it came too late, else the invalid field."""
        self.metrics.refused.labels(reason).inc()
        if reason in TOO_LATE_REASONS:
            self.metrics.dropped.labels(reason).inc(leaves)

    def record_duplicate(self) -> None:
        self.metrics.duplicates.inc()

    def record_subtree(self, group: RolloutGroup, subtree: Subtree) -> None:
        """Count an accepted subtree."""
        kind, cost = group.lease.kind.value, subtree.cost
        for how, tokens in (("prefilled", cost.prefilled), ("cached", cost.cached), ("decoded", cost.decoded)):
            self._labels(self.metrics.tokens, kind, how).inc(tokens)
        self._labels(self.metrics.leaves, kind).inc(len(subtree.leaves))
        if group.granted_at is not None:
            self.metrics.subtree_seconds.observe(time.monotonic() - group.granted_at)
        self._record_prefixes(group, subtree)
        for step in subtree.steps:
            if step.status.failed:
                self.metrics.failed_steps.labels(step.status.value).inc()

    def _record_prefixes(self, group: RolloutGroup, subtree: Subtree) -> None:
        """Count the prefix tokens of turns by depth; summed first, since a counter costs more than an addition."""
        by_depth: dict[int, tuple[int, int]] = {}
        for step, depth in zip(subtree.steps, group.group.depths(subtree), strict=True):
            at = min(depth, MAX_DEPTH_LABEL)
            cached, prefilled = by_depth.get(at, (0, 0))
            by_depth[at] = (cached + step.cost.cached, prefilled + step.cost.prefilled)
        for at, (cached, prefilled) in by_depth.items():
            self._labels(self.metrics.prefix, str(at), "cached").inc(cached)
            self._labels(self.metrics.prefix, str(at), "prefilled").inc(prefilled)

    def record_lease_end(self, group: RolloutGroup, end: LeaseEnd) -> None:
        """Count an ended lease; the yield of its group is counted when the group is closed."""
        kind = group.lease.kind
        self._labels(self.metrics.ended, kind.value, end.reason.value).inc()
        self._spent[kind] += Budget.for_cost(end.unaccounted)
        if group.state is not GroupState.SETTLED:
            self.record_group_close(group, end.reason.value, end.error)

    def record_group_close(self, group: RolloutGroup, why: str, error: str = "") -> None:
        """Count the yield of a closed group; list one that is set aside. ``why``: the metric's label."""
        kind = group.lease.kind
        if was_given_up(group):
            self.metrics.set_aside.labels(kind.value, why).inc()
            self._list_set_aside(group, why, error or SET_ASIDE_REASONS.get(why, why))
        if group.state is not GroupState.READY:
            return
        self._labels(self.metrics.groups, kind.value, why).inc()
        self._labels(self.metrics.forgone, kind.value).inc(group.forgone)
        leaves = [leaf for _, leaf in group.group.leaves()]
        if not leaves:  # a journal of an earlier version may have groups whose leaves are rejected today
            return
        rewards = [leaf.reward for leaf in leaves]
        em = sum(leaf.metrics.get("em", 0.0) for leaf in leaves) / len(leaves)
        if kind is LeaseKind.TRAIN and max(rewards) == min(rewards):
            self.metrics.zero_signal.inc()
        self._labels(self.metrics.unique, kind.value).inc(group.group.unique_tokens)
        self._recent_means[kind].append((sum(rewards) / len(rewards), em))
        self._spent[kind] += Budget.for_cost(group.group.cost)
        chain = Budget.for_cost(group.group.chain_equivalent())
        self._chain[kind] += chain
        self._needed[kind] += Budget.for_cost(group.group.needed())
        for currency in CURRENCIES:
            self._labels(self.metrics.chain, kind.value, currency).inc(getattr(chain, currency))

    def _refresh_means(self, kind: LeaseKind) -> None:
        recent = tuple(self._recent_means[kind])
        self.metrics.recomputed.labels(kind.value).set(self.recomputed_ratio(kind))
        for currency in CURRENCIES:
            self.metrics.saving.labels(kind.value, currency).set(self.saving_ratio(kind, currency))
        for gauge, place in ((self.metrics.reward, 0), (self.metrics.em, 1)):
            gauge.labels(kind.value).set(sum(row[place] for row in recent) / len(recent))

    def _list_set_aside(self, group: RolloutGroup, why: str, error: str) -> None:
        """List a group in progress.jsonl and set_aside.jsonl for the operator; once, however often its events are replayed."""
        row = {
            "kind": "set_aside",
            "lease": group.lease.id,
            "draw": group.draw,
            "question": group.lease.question.id,
            "tries": group.attempts,
            "leaves": sum(len(subtree.leaves) for subtree in group.subtrees),
            "why": why,
            "error": error,
        }
        self._progress.append_row(row)
        if self._set_aside_log.append_row(row):
            log.warning("question %s is set aside after %d tries, the last %s: %s", row["question"], group.attempts, why, error)

    def saving_ratio(self, kind: LeaseKind, currency: str) -> float:
        """1 - needed / what chains to the same leaves would have needed, over the closed groups; see docs/adr/0002."""
        chain = getattr(self._chain[kind], currency)
        return 1.0 - getattr(self._needed[kind], currency) / chain if chain else 0.0

    def recomputed_ratio(self, kind: LeaseKind) -> float:
        """Share of the spent tokens that were computed again, since new weights make every cached key and value stale.

        A cache that shares prefixes between questions lowers it, to 0 at least.
        """
        spent = self._spent[kind].tokens
        return max(0.0, 1.0 - self._needed[kind].tokens / spent) if spent else 0.0

    def _refresh(self, table: LeaseTable) -> None:
        """Set the metrics that no event updates. Runs in the thread of the scrape."""
        for kind, accounts in table.ledger.summary().items():
            for currency, row in accounts.items():
                self.metrics.outstanding.labels(kind, currency).set(row.pop("outstanding"))
                for name, total in row.items():
                    place = (LeaseKind(kind), currency, name)
                    getattr(self.metrics, name).labels(kind, currency).inc(total - self._counted.get(place, 0))
                    self._counted[place] = total
        for kind in LeaseKind:
            self.metrics.leases.labels(kind.value).set(table.count_active_leases(kind))
            if self._recent_means[kind]:
                self._refresh_means(kind)
        self.metrics.lease_limit.set(table.lease_limit)
        self.metrics.ready.set(table.train_queue.untrained_count)

    def record_step(self, values: Mapping[str, object], table: LeaseTable) -> None:
        """Write a step's progress line, with the ledger's totals; nothing if the file has it already."""
        self._progress.append_row({"kind": "step", **values, **self._ledger_totals(table)})

    def record_evaluation(self, done: EvaluationRound, table: LeaseTable) -> None:
        """Write the progress line of a finished evaluation; nothing if the file has it already."""
        result = done.result()
        row = {"version": str(done.version), "questions": result.questions, "em": result.em, "reward": result.reward}
        self._progress.append_row({"kind": "eval", **row, "failed": result.failed, **self._ledger_totals(table)})

    def record_stall(self, cause: str, seconds: float) -> None:
        """Write a progress line about a run without progress; the next line of another kind ends the stall."""
        self._progress.append_row({"kind": "waiting", "for": cause, "seconds": round(seconds)})

    def _ledger_totals(self, table: LeaseTable) -> dict[str, object]:
        return {
            "ledger": table.ledger.summary(),
            "chain_tokens": self._chain[LeaseKind.TRAIN].tokens,
            "recomputed": self.recomputed_ratio(LeaseKind.TRAIN),
            "saving": self.saving_ratio(LeaseKind.TRAIN, "tokens"),
            "saving_tool_calls": self.saving_ratio(LeaseKind.TRAIN, "tool_calls"),
            "samplers": self._samplers,
        }

    def snapshot_counters(self) -> dict[str, Any]:
        """Plain data for `restore_counters`: the sums over all events so far."""
        return {
            "counters": {counter: _counter_samples(getattr(self.metrics, counter)) for counter in REPLAYED_COUNTERS},
            "kinds": {
                kind.value: {
                    "recent": [list(row) for row in self._recent_means[kind]],
                    "spent": astuple(self._spent[kind]),
                    "chain": astuple(self._chain[kind]),
                    "needed": astuple(self._needed[kind]),
                }
                for kind in LeaseKind
            },
        }

    def restore_counters(self, row: dict[str, Any]) -> None:
        """Set a new recorder to what `snapshot_counters` returned."""
        for counter, samples in row["counters"].items():
            for labels, value in samples:
                metric: Counter = getattr(self.metrics, counter)
                (metric.labels(**labels) if labels else metric).inc(value)
        for kind in LeaseKind:
            sums = row["kinds"][kind.value]
            self._recent_means[kind].extend((reward, em) for reward, em in sums["recent"])
            self._spent[kind], self._chain[kind], self._needed[kind] = (
                Budget(*sums[name]) for name in ("spent", "chain", "needed")
            )


def _counter_samples(counter: Counter) -> list[tuple[dict[str, str], float]]:
    return [(s.labels, s.value) for family in counter.collect() for s in family.samples if s.name.endswith("_total")]


def _free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder; 0 if it is gone."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _segment_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
            total += path.stat().st_size
    return total
