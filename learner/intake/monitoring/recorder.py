"""What the intake tells the world: its metrics, and a line of the run's progress file for each step and evaluation."""

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

from learner.intake.leases.evaluation import Round
from learner.intake.leases.lease_table import LeaseBook
from learner.intake.leases.rollout_group import Fate, OpenGroup
from learner.intake.leases.subtree_validation import TOO_LATE
from learner.intake.monitoring.progress_log import ProgressLog
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import SUFFIX
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseEnd, LeaseKind
from treegrpo.core.step import Subtree
from treegrpo.observability.metrics import IntakeMetrics

log = logging.getLogger(__name__)
SENTENCES = {
    "overdue": "the staleness bound was reached before its first leaf",
    "stale": "it is older than train.max_lag allows",
}
"""Why a group is given up that no lease's end explains."""
CURRENCIES = ("tokens", "tool_calls")
DEEPEST = 8
"""Steps from the root that are told apart; what is deeper is counted there."""
REPLAYED = (
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
"""The counters that only events of the journal move."""


class RunRecorder:
    def __init__(self, metrics: IntakeMetrics, progress: Path, window: int) -> None:
        """``window``: groups that a mean is taken over."""
        self.metrics = metrics
        self._progress = ProgressLog(progress)
        self._aside = ProgressLog(progress.with_name("set_aside.jsonl"))
        self._recent = {kind: deque[tuple[float, float]](maxlen=window) for kind in LeaseKind}
        self._spent = {kind: Budget() for kind in LeaseKind}
        self._chain = {kind: Budget() for kind in LeaseKind}
        self._needed = {kind: Budget() for kind in LeaseKind}
        self._samplers = 0
        self._counted: dict[tuple[LeaseKind, str, str], int] = {}
        self._labelled: dict[tuple[Counter, tuple[str, ...]], Counter] = {}

    def keep(self, book: LeaseBook) -> None:
        """Show ledger and leases at each scrape."""
        self.metrics.refresh = lambda: self._show(book)

    def watch(self, journal: Journal) -> None:
        """Show the journal at each scrape."""
        self.metrics.journal_blocked.set_function(lambda: journal.blocked)
        self.metrics.journal_short.set_function(lambda: journal.short_since is not None)
        self.metrics.journal_bytes.set_function(lambda: _bytes(journal.folder))
        self.metrics.journal_free.set_function(lambda: _free(journal.folder))

    def _of(self, counter: Counter, *labels: str) -> Counter:
        """What ``counter.labels`` gives, which takes longer than all else that is counted of a subtree."""
        found = self._labelled.get((counter, labels))
        if found is None:
            found = self._labelled[(counter, labels)] = counter.labels(*labels)
        return found

    def samplers(self, count: int, aside: int) -> None:
        """So many samplers have an open stream; so many of them are put aside."""
        self._samplers = count
        self.metrics.samplers.set(count)
        self.metrics.put_aside.set(aside)

    def refused(self, reason: str, leaves: int) -> None:
        """A subtree was not wanted: "lease" or "overdue" if it came too late, else what of it is wrong."""
        self.metrics.refused.labels(reason).inc()
        if reason in TOO_LATE:
            self.metrics.dropped.labels(reason).inc(leaves)

    def duplicate(self) -> None:
        self.metrics.duplicates.inc()

    def accepted(self, group: OpenGroup, subtree: Subtree) -> None:
        """A subtree came in."""
        kind, cost = group.lease.kind.value, subtree.cost
        for how, tokens in (("prefilled", cost.prefilled), ("cached", cost.cached), ("decoded", cost.decoded)):
            self._of(self.metrics.tokens, kind, how).inc(tokens)
        self._of(self.metrics.leaves, kind).inc(len(subtree.leaves))
        if group.granted_at is not None:
            self.metrics.subtree_seconds.observe(time.monotonic() - group.granted_at)
        self._prefixes(group, subtree)
        for step in subtree.steps:
            if step.status.failed:
                self.metrics.failed_steps.labels(step.status.value).inc()

    def _prefixes(self, group: OpenGroup, subtree: Subtree) -> None:
        """Count what turns begin from; first added up by depth, since a counter costs more than an addition."""
        begun: dict[int, tuple[int, int]] = {}
        for step, depth in zip(subtree.steps, group.group.depths(subtree), strict=True):
            at = min(depth, DEEPEST)
            cached, prefilled = begun.get(at, (0, 0))
            begun[at] = (cached + step.cost.cached, prefilled + step.cost.prefilled)
        for at, (cached, prefilled) in begun.items():
            self._of(self.metrics.prefix, str(at), "cached").inc(cached)
            self._of(self.metrics.prefix, str(at), "prefilled").inc(prefilled)

    def ended(self, group: OpenGroup, end: LeaseEnd) -> None:
        """A lease ended; what its group is worth is counted when the group is closed."""
        kind = group.lease.kind
        self._of(self.metrics.ended, kind.value, end.reason.value).inc()
        self._spent[kind] += Budget.for_cost(end.unaccounted)
        if not group.closed:
            self.closed(group, end.reason.value, end.error)

    def closed(self, group: OpenGroup, why: str, error: str = "") -> None:
        """Count what a group is worth, if it is closed; list it if nobody will try it again."""
        kind = group.lease.kind
        if group.given_up:
            self.metrics.set_aside.labels(kind.value, why).inc()
            self._gave_up(group, why, error or SENTENCES.get(why, why))
        if group.fate is not Fate.CLOSED:
            return
        self._of(self.metrics.groups, kind.value, why).inc()
        self._of(self.metrics.forgone, kind.value).inc(group.forgone)
        leaves = [leaf for _, leaf in group.group.leaves()]
        if not leaves:  # the journal has what would be refused today
            return
        rewards = [leaf.reward for leaf in leaves]
        em = sum(leaf.metrics.get("em", 0.0) for leaf in leaves) / len(leaves)
        if kind is LeaseKind.TRAIN and max(rewards) == min(rewards):
            self.metrics.zero_signal.inc()
        self._of(self.metrics.unique, kind.value).inc(group.group.unique_tokens)
        self._recent[kind].append((sum(rewards) / len(rewards), em))
        self._spent[kind] += Budget.for_cost(group.group.cost)
        chain = Budget.for_cost(group.group.chain_equivalent())
        self._chain[kind] += chain
        self._needed[kind] += Budget.for_cost(group.group.needed())
        for currency in CURRENCIES:
            self._of(self.metrics.chain, kind.value, currency).inc(getattr(chain, currency))

    def _means(self, kind: LeaseKind) -> None:
        recent = tuple(self._recent[kind])
        self.metrics.recomputed.labels(kind.value).set(self.recomputed(kind))
        for currency in CURRENCIES:
            self.metrics.saving.labels(kind.value, currency).set(self.saving(kind, currency))
        for gauge, place in ((self.metrics.reward, 0), (self.metrics.em, 1)):
            gauge.labels(kind.value).set(sum(row[place] for row in recent) / len(recent))

    def _gave_up(self, group: OpenGroup, why: str, error: str) -> None:
        """List a group for somebody to look at: in progress.jsonl and in set_aside.jsonl, once, however often it is replayed."""
        row = {
            "kind": "set_aside",
            "lease": group.lease.id,
            "draw": group.draw,
            "question": group.lease.question.id,
            "tries": group.tries,
            "leaves": sum(len(subtree.leaves) for subtree in group.subtrees),
            "why": why,
            "error": error,
        }
        self._progress.add(row)
        if self._aside.add(row):
            log.warning("question %s is set aside after %d tries, the last %s: %s", row["question"], group.tries, why, error)

    def saving(self, kind: LeaseKind, currency: str) -> float:
        """1 - needed / what chains to the same leaves would have needed, over the closed groups; see docs/adr/0002."""
        chain = getattr(self._chain[kind], currency)
        return 1.0 - getattr(self._needed[kind], currency) / chain if chain else 0.0

    def recomputed(self, kind: LeaseKind) -> float:
        """Share of the spent tokens that the trees did not need: new weights make every cached key and value stale.

        What a cache shares between questions goes the other way and is taken off, so it is 0 at least.
        """
        spent = self._spent[kind].tokens
        return max(0.0, 1.0 - self._needed[kind].tokens / spent) if spent else 0.0

    def _show(self, book: LeaseBook) -> None:
        """Bring up to date what is not counted as it happens. In the thread of the scrape."""
        for kind, accounts in book.ledger.summary().items():
            for currency, row in accounts.items():
                self.metrics.outstanding.labels(kind, currency).set(row.pop("outstanding"))
                for name, total in row.items():
                    place = (LeaseKind(kind), currency, name)
                    getattr(self.metrics, name).labels(kind, currency).inc(total - self._counted.get(place, 0))
                    self._counted[place] = total
        for kind in LeaseKind:
            self.metrics.leases.labels(kind.value).set(book.out(kind))
            if self._recent[kind]:
                self._means(kind)
        self.metrics.lease_limit.set(book.limit)
        self.metrics.ready.set(book.groups.waiting)

    def step(self, values: Mapping[str, object], book: LeaseBook) -> None:
        """A progress line of the trainer's, with the books beside it; none if it is there already."""
        self._progress.add({"kind": "step", **values, **self._books(book)})

    def evaluated(self, done: Round, book: LeaseBook) -> None:
        """A progress line of a finished evaluation; none if it is there already."""
        result = done.result()
        row = {"version": str(done.version), "questions": result.questions, "em": result.em, "reward": result.reward}
        self._progress.add({"kind": "eval", **row, "failed": result.failed, **self._books(book)})

    def waits(self, what: str, seconds: float) -> None:
        """A progress line of a run in which nothing goes on; the next line of another kind ends it."""
        self._progress.add({"kind": "waiting", "for": what, "seconds": round(seconds)})

    def _books(self, book: LeaseBook) -> dict[str, object]:
        return {
            "ledger": book.ledger.summary(),
            "chain_tokens": self._chain[LeaseKind.TRAIN].tokens,
            "recomputed": self.recomputed(LeaseKind.TRAIN),
            "saving": self.saving(LeaseKind.TRAIN, "tokens"),
            "saving_tool_calls": self.saving(LeaseKind.TRAIN, "tool_calls"),
            "samplers": self._samplers,
        }

    def state(self) -> dict[str, Any]:
        """Plain data to be restored from: what the events so far have added up to."""
        return {
            "counters": {counter: _samples(getattr(self.metrics, counter)) for counter in REPLAYED},
            "kinds": {
                kind.value: {
                    "recent": [list(row) for row in self._recent[kind]],
                    "spent": astuple(self._spent[kind]),
                    "chain": astuple(self._chain[kind]),
                    "needed": astuple(self._needed[kind]),
                }
                for kind in LeaseKind
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become, new, what `state` was taken of."""
        for counter, samples in state["counters"].items():
            for labels, value in samples:
                metric: Counter = getattr(self.metrics, counter)
                (metric.labels(**labels) if labels else metric).inc(value)
        for kind in LeaseKind:
            row = state["kinds"][kind.value]
            self._recent[kind].extend((reward, em) for reward, em in row["recent"])
            self._spent[kind], self._chain[kind], self._needed[kind] = (
                Budget(*row[name]) for name in ("spent", "chain", "needed")
            )


def _samples(counter: Counter) -> list[tuple[dict[str, str], float]]:
    return [(s.labels, s.value) for family in counter.collect() for s in family.samples if s.name.endswith("_total")]


def _free(folder: Path) -> int:
    """0 where there is no such folder any more."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
            total += path.stat().st_size
    return total
