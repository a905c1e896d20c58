"""Audits the records of a run: every leased group is trained exactly once or accounted for, and the ledger balances.

journal ──► LedgerReplay: every draw, its subtrees, its position      progress.jsonl ──► chain: the steps that count
            └────────────────────┬──────────────────────────────────────┘
                 step s trained positions p−B … p−1, and those are exactly the groups it says
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.ledger_replay import LedgerReplay, SpentTotals
from tests.chaos.run_records import JournalArchive, Row, read_rows, trained_position
from treegrpo.core.budget import Budget

KINDS = ("train", "eval")
CURRENCIES = ("tokens", "tool_calls")


@dataclass(slots=True)
class RunAudit:
    """What was found; the lists say each thing in words."""

    lost: list[str] = field(default_factory=list[str])
    duplicated: list[str] = field(default_factory=list[str])
    unbalanced: list[str] = field(default_factory=list[str])
    trained: int = 0
    """Groups."""
    accounted: Counter[str] = field(default_factory=Counter[str])
    """Groups that are not trained, by why."""
    unreported: int = 0
    """Steps that were taken and whose record never reached the progress file; their groups follow from the positions."""
    hostile_leases: int = 0
    """That the hostile sampler was given."""
    chain: list[Row] = field(default_factory=list[Row])
    """The records of the steps that count, in order."""
    evals: list[Row] = field(default_factory=list[Row])

    @property
    def step(self) -> int:
        """The last one."""
        return self.chain[-1]["step"] if self.chain else 0

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.unbalanced)


def audit_run(run_dir: Path, archive: JournalArchive, *, ended: bool) -> RunAudit:
    """Audit a run that goes on, or one that has ``ended`` after its last step: then nothing may still be on its way."""
    lines = read_rows(run_dir / "progress.jsonl")  # before the journal: what a line speaks of is in the journal by now
    position = trained_position(run_dir / "checkpoints")
    ledger = LedgerReplay.replay(archive.events())
    found = RunAudit(chain=chain(lines), evals=[line for line in lines if line["kind"] == "eval"])
    found.duplicated += ledger.twice
    found.hostile_leases = ledger.hostile
    for line in lines:
        found.unbalanced += imbalances(line)
    found.unbalanced += unknown_totals(lines, ledger.history)
    check_chain(found, ledger)
    if position > len(ledger.line):
        found.lost.append(f"a checkpoint stands at position {position}, and the journal gave out {len(ledger.line)}")
    found.trained = min(position, len(ledger.line))
    if ended:
        aside = {row["draw"]: row["why"] for row in read_rows(run_dir / "set_aside.jsonl") if row["draw"] >= 0}
        account_for_draws(found, ledger, aside)
    return found


def chain(lines: list[Row]) -> list[Row]:
    """The step records without those that a restart from an earlier checkpoint has orphaned."""
    kept: list[Row] = []
    for line in lines:
        if line["kind"] == "step":
            kept = [*(old for old in kept if old["step"] < line["step"]), line]
    return kept


def imbalances(line: Row) -> list[str]:
    """Each kind and currency in which the ledger of a progress line does not balance."""
    found: list[str] = []
    for kind in KINDS:
        for currency in CURRENCIES:
            row = line.get("ledger", {}).get(kind, {}).get(currency, {})
            rest = row and row["granted"] - row["spent"] - row["refunded"] - row["forfeited"] - row["outstanding"]
            if rest:
                found.append(f"{describe_line(line)}: {kind} {currency} are out by {rest}")
    return found


def unknown_totals(lines: list[Row], history: list[SpentTotals]) -> list[str]:
    """Progress lines whose spent totals the journal never led to."""
    known = set(history)
    return [
        f"{describe_line(line)}: the journal never led to its totals"
        for line in lines
        if "ledger" in line and spent(line) not in known
    ]


def spent(line: Row) -> SpentTotals:
    train, evaluation = (Budget(*(line["ledger"][kind][currency]["spent"] for currency in CURRENCIES)) for kind in KINDS)
    return train, evaluation


def check_chain(found: RunAudit, ledger: LedgerReplay) -> None:
    """Each step trained what was at its positions, once, and no position lies between two steps."""
    at, before, seen = 0, 0, Counter[str]()
    for line in found.chain:
        first = line["position"] - line["groups"] - line["groups_refused"]
        missing = line["step"] - before - 1
        found.unreported += missing
        if first < at:
            found.duplicated.append(f"{describe_line(line)} begins at position {first}, and the one before ended at {at}")
        if first > at and not missing:
            found.lost.append(f"positions {at} to {first - 1} were never trained: {describe_line(line)} begins at {first}")
        _compare(found, ledger, line, first)
        seen.update(line["group_ids"])
        at, before = line["position"], line["step"]
    found.duplicated += [f"group {group} was trained {count} times" for group, count in seen.items() if count > 1]


def _compare(found: RunAudit, ledger: LedgerReplay, line: Row, first: int) -> None:
    """What a step says it trained against what the journal has at its positions."""
    numbers = ledger.line[first : line["position"]]
    due, got = {f"{number:07d}" for number in numbers}, set(line["group_ids"])
    for group in sorted(got - due):
        found.duplicated.append(f"{describe_line(line)} trained group {group}, which is not at its positions")
    if len(numbers) < line["groups"] or len(due - got) > line["groups_refused"]:
        found.lost.append(f"{describe_line(line)} did not train {', '.join(sorted(due - got)) or 'what the journal lacks'}")
    found.accounted["refused by the trainer"] += line["groups_refused"]
    leaves = sum(sum(ledger.draws[number].leaves.values()) for number in numbers)
    if not line["groups_refused"] and leaves > line["leaves"]:
        found.lost.append(f"{describe_line(line)} trained {line['leaves']} leaves of {leaves} that were acknowledged")


def account_for_draws(found: RunAudit, ledger: LedgerReplay, aside: dict[int, str]) -> None:
    """At the end of a run every draw is trained, or there is a word about it. Too old is none while batch and bound stay."""
    trained = set(ledger.line[: found.trained])
    for number, draw in sorted(ledger.draws.items()):
        if number in trained:
            continue
        if number in ledger.stale:
            found.lost.append(f"draw {number} was left out as stale, and nobody has lowered the bound")
        elif number in aside:
            found.accounted[aside[number]] += 1
        else:
            where = "in line" if number in ledger.line else f"of {len(draw.leases)} leases, {sum(draw.leaves.values())} leaves"
            found.lost.append(f"draw {number} ({where}) was neither trained nor accounted for")
    found.lost += [f"lease {lease} is still open" for lease in sorted(ledger.open_leases)]


def describe_line(line: Row) -> str:
    """A progress line, for sentences."""
    return f"step {line['step']} ({line['version']})" if line["kind"] == "step" else f"evaluation of {line.get('version', '?')}"
