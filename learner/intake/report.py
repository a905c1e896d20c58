"""What the intake tells the world: its metrics, and a line of the run's progress file for each step and evaluation."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from learner.intake.evaluation import Round
from learner.intake.groups import OpenGroup
from learner.intake.leases import LeaseBook
from treegrpo.budget import Budget
from treegrpo.lease import LeaseEnd, LeaseEndReason, LeaseKind
from treegrpo.telemetry import IntakeMetrics
from treegrpo.tree import Subtree

CURRENCIES = ("tokens", "tool_calls")


class Reporter:
    def __init__(self, metrics: IntakeMetrics, progress: Path, window: int) -> None:
        """``window``: groups that a mean is taken over."""
        self.metrics = metrics
        self._progress = progress
        self._recent = {kind: deque[tuple[float, float]](maxlen=window) for kind in LeaseKind}
        self._spent = {kind: Budget() for kind in LeaseKind}
        self._chain = {kind: Budget() for kind in LeaseKind}
        self._needed = {kind: Budget() for kind in LeaseKind}
        self._samplers = 0
        self._counted: dict[tuple[LeaseKind, str, str], int] = {}

    def samplers(self, count: int) -> None:
        """So many samplers have an open stream."""
        self._samplers = count
        self.metrics.samplers.set(count)

    def refused(self, reason: str) -> None:
        """A subtree was not wanted: "lease" if its lease is not open, else what of it is wrong."""
        self.metrics.refused.labels(reason).inc()

    def duplicate(self) -> None:
        self.metrics.duplicates.inc()

    def accepted(self, group: OpenGroup, subtree: Subtree) -> None:
        """A subtree came in."""
        kind, cost = group.lease.kind.value, subtree.cost
        for how, tokens in (("prefilled", cost.prefilled), ("cached", cost.cached), ("decoded", cost.decoded)):
            self.metrics.tokens.labels(kind, how).inc(tokens)
        self.metrics.leaves.labels(kind).inc(len(subtree.leaves))
        if group.granted_at is not None:
            self.metrics.subtree_seconds.observe(time.monotonic() - group.granted_at)
        for step in subtree.steps:
            if step.status.failed:
                self.metrics.failed_steps.labels(step.status.value).inc()

    def ended(self, group: OpenGroup, end: LeaseEnd) -> None:
        """A lease ended: count what its group is worth."""
        kind = group.lease.kind
        self.metrics.groups.labels(kind.value, end.reason.value).inc()
        self.metrics.forgone.labels(kind.value).inc(end.forgone)
        leaves = [leaf for _, leaf in group.group.leaves()]
        if not leaves or end.reason is LeaseEndReason.LOST:  # a lost question is rolled out, and counted, again
            return
        rewards = [leaf.reward for leaf in leaves]
        em = sum(leaf.metrics.get("em", 0.0) for leaf in leaves) / len(leaves)
        if kind is LeaseKind.TRAIN and max(rewards) == min(rewards):
            self.metrics.zero_signal.inc()
        self.metrics.unique.labels(kind.value).inc(group.group.unique_tokens)
        self._recent[kind].append((sum(rewards) / len(rewards), em))
        self._spent[kind] += Budget.of(group.group.cost) + Budget.of(end.unaccounted)
        chain = Budget.of(group.group.chain_equivalent())
        self._chain[kind] += chain
        self._needed[kind] += Budget.of(group.group.needed())
        self.metrics.recomputed.labels(kind.value).set(self.recomputed(kind))
        for currency in CURRENCIES:
            self.metrics.chain.labels(kind.value, currency).inc(getattr(chain, currency))
            self.metrics.saving.labels(kind.value, currency).set(self.saving(kind, currency))
        for gauge, place in ((self.metrics.reward, 0), (self.metrics.em, 1)):
            gauge.labels(kind.value).set(sum(row[place] for row in self._recent[kind]) / len(self._recent[kind]))

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

    def book(self, book: LeaseBook) -> None:
        """Bring the metrics of ledger and leases up to date."""
        for kind, accounts in book.ledger.summary().items():
            for currency, row in accounts.items():
                self.metrics.outstanding.labels(kind, currency).set(row.pop("outstanding"))
                for name, total in row.items():
                    place = (LeaseKind(kind), currency, name)
                    getattr(self.metrics, name).labels(kind, currency).inc(total - self._counted.get(place, 0))
                    self._counted[place] = total
        for kind in LeaseKind:
            self.metrics.leases.labels(kind.value).set(book.out(kind))
        self.metrics.lease_limit.set(book.limit)
        self.metrics.ready.set(book.groups.waiting)

    def step(self, values: Mapping[str, object], book: LeaseBook) -> None:
        """A progress line of the trainer's, with the books beside it."""
        self._write({"kind": "step", **values, **self._books(book)})

    def evaluated(self, done: Round, book: LeaseBook) -> None:
        """A progress line of a finished evaluation."""
        result = done.result()
        row = {"version": str(done.version), "questions": result.questions, "em": result.em, "reward": result.reward}
        self._write({"kind": "eval", **row, "failed": result.failed, **self._books(book)})

    def _books(self, book: LeaseBook) -> dict[str, object]:
        self.book(book)
        return {
            "ledger": book.ledger.summary(),
            "chain_tokens": self._chain[LeaseKind.TRAIN].tokens,
            "recomputed": self.recomputed(LeaseKind.TRAIN),
            "saving": self.saving(LeaseKind.TRAIN, "tokens"),
            "saving_tool_calls": self.saving(LeaseKind.TRAIN, "tool_calls"),
            "samplers": self._samplers,
        }

    def _write(self, row: Mapping[str, object]) -> None:
        with self._progress.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")
