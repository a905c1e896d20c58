"""Replays the journal's events into a second ledger, independently of the intake's code.

A contradiction here means that something was counted twice or lost there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from learner.intake.wal.framing import Record
from tests.chaos.hostile_sampler import NAME as HOSTILE
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import LeaseKind
from treegrpo.v1 import rollout_pb2, tree_pb2
from treegrpo.wire.codec import cost_from_pb, lease_end_from_pb, lease_from_pb

SpentTotals = tuple[Budget, Budget]
"""Spent for training and for evaluation."""


@dataclass(slots=True)
class DrawnQuestion:
    """A training question that was drawn, and what was accepted for it."""

    leases: list[str] = field(default_factory=list[str])
    leaves: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """Leaves of each accepted subtree, by (tree, index)."""


@dataclass(slots=True)
class LedgerReplay:
    draws: dict[int, DrawnQuestion] = field(default_factory=dict[int, DrawnQuestion])
    line: list[int] = field(default_factory=list[int])
    """Draws in the order in which the trainer gets them: their places are the positions."""
    stale: set[int] = field(default_factory=set[int])
    kinds: dict[str, LeaseKind] = field(default_factory=dict[str, LeaseKind])
    """Of every lease."""
    open_leases: set[str] = field(default_factory=set[str])
    spent: dict[LeaseKind, Budget] = field(default_factory=lambda: {kind: Budget() for kind in LeaseKind})
    history: list[SpentTotals] = field(default_factory=list[SpentTotals])
    """`spent` after every event."""
    twice: list[str] = field(default_factory=list[str])
    """What was counted a second time, each in words."""
    hostile: int = 0
    """Leases of the hostile sampler."""
    _owner: dict[str, int] = field(default_factory=dict[str, int])
    """The draw of each training lease."""

    @classmethod
    def replay(cls, events: Iterable[Record]) -> LedgerReplay:
        ledger = cls()
        ledger._record_totals()
        for event in events:
            ledger._apply(event)
            ledger._record_totals()
        return ledger

    def _record_totals(self) -> None:
        totals = (self.spent[LeaseKind.TRAIN], self.spent[LeaseKind.EVAL])
        if not self.history or self.history[-1] != totals:
            self.history.append(totals)

    def _apply(self, event: Record) -> None:
        match event["event"]:
            case "granted":
                self._granted(rollout_pb2.Lease.FromString(event["lease"]), event["draw"])
                self.hostile += event["holder"].startswith(f"{HOSTILE}/")
            case "accepted":
                self._accepted(tree_pb2.Subtree.FromString(event["subtree"]))
            case "ended":
                self._ended(rollout_pb2.LeaseEnd.FromString(event["end"]))
            case "taken":
                self._taken(event["draws"], event["stale"])
            case (
                "closed" | "refused"
            ):  # when a group is closed, not what is in it; what no group has: its lease's end has the cost
                pass
            case unknown:
                raise ValueError(f"the audit does not know the journal's event {unknown!r}")

    def _granted(self, sent: rollout_pb2.Lease, number: int) -> None:
        lease = lease_from_pb(sent)
        if lease.id in self.kinds:
            self.twice.append(f"lease {lease.id} was granted twice")
        self.kinds[lease.id] = lease.kind
        self.open_leases.add(lease.id)
        if lease.kind is LeaseKind.TRAIN:
            draw = self.draws.setdefault(number, DrawnQuestion())
            if not sum(draw.leaves.values()):  # what has no leaf begins again from nothing
                draw.leaves.clear()
            draw.leases.append(lease.id)
            self._owner[lease.id] = number
            if number in self.line or number in self.stale:
                self.twice.append(f"draw {number} was leased after it had been given to the trainer")

    def _accepted(self, sent: tree_pb2.Subtree) -> None:
        self._spend(self.kinds[sent.lease], sum((cost_from_pb(step.cost) for step in sent.steps), Cost()))
        number = self._owner.get(sent.lease)
        if number is None:
            return
        draw, key = self.draws[number], (sent.tree, sent.index)
        if key in draw.leaves:
            self.twice.append(f"subtree {key} of draw {number} was accepted twice")
        if sent.lease != draw.leases[-1]:
            self.twice.append(f"draw {number} got a subtree of lease {sent.lease} after another had gone on with it")
        if number in self.line:
            self.twice.append(f"draw {number} got a subtree after it had been given to the trainer")
        draw.leaves[key] = len(sent.leaves)

    def _ended(self, sent: rollout_pb2.LeaseEnd) -> None:
        end = lease_end_from_pb(sent)
        if end.lease not in self.open_leases:
            self.twice.append(f"lease {end.lease} ended twice, or was never granted")
        self.open_leases.discard(end.lease)
        if not end.reason.silent:
            self._spend(self.kinds[end.lease], end.unaccounted)

    def _taken(self, draws: list[int], stale: list[int]) -> None:
        for number in (*draws, *stale):
            if number in self.line or number in self.stale:
                self.twice.append(f"draw {number} was given to the trainer twice")
        self.line += draws
        self.stale |= set(stale)

    def _spend(self, kind: LeaseKind, cost: Cost) -> None:
        self.spent[kind] += Budget.for_cost(cost)
