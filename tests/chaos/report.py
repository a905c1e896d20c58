"""The report of a chaos run: a table of its faults and their outcomes, and one line of JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, variance

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import Row, RunAudit
from tests.chaos.driver import FaultOutcome


@dataclass(frozen=True, slots=True)
class RewardTrend:
    """How a value changed over the steps of a run."""

    first: float
    """Mean of the first third."""
    last: float
    """Mean of the last third."""
    half_width: float
    """Of the 95 % interval of the difference (Welch, steps taken as independent)."""

    @classmethod
    def of(cls, values: Sequence[float]) -> RewardTrend | None:
        """None if there are too few."""
        if (third := len(values) // 3) < 2:
            return None
        first, last = values[:third], values[-third:]
        return cls(mean(first), mean(last), 1.96 * math.sqrt(variance(first) / third + variance(last) / third))


@dataclass(slots=True)
class ChaosReport:
    seed: int
    outcomes: list[FaultOutcome]
    audit: RunAudit
    restarts: Counter[str]
    hung: list[str] = field(default_factory=list[str])
    """What did not recover, or did not end."""
    memory_leaks: list[str] = field(default_factory=list[str])
    growth: float = 1.0

    @property
    def passed(self) -> bool:
        return self.audit.clean and not (self.hung or self.memory_leaks or self.reward_declined)

    @property
    def reward(self) -> RewardTrend | None:
        return RewardTrend.of([line["reward_mean"] for line in self.audit.chain])

    @property
    def reward_declined(self) -> bool:
        """The reward fell by more than chance explains. Whether it rises is for a long run to show."""
        return self.reward is not None and self.reward.last - self.reward.first + self.reward.half_width < 0

    def summary_row(self) -> Row:
        """The line of JSON."""
        evals = [line["em"] for line in self.audit.evals] or [None]
        recoveries = [outcome.recovery for outcome in self.outcomes if outcome.recovery is not None]
        return {
            "faults": len(self.outcomes),
            "lost": len(self.audit.lost),
            "duplicated": len(self.audit.duplicated),
            "unbalanced": len(self.audit.unbalanced),
            "hung": len(self.hung),
            "max_recovery_s": round(max(recoveries, default=0.0), 1),
            "seed": self.seed,
            "steps": len(self.audit.chain) + self.audit.unreported,
            "steps_unreported": self.audit.unreported,
            "groups_trained": self.audit.trained,
            "groups_accounted": {why: count for why, count in self.audit.accounted.items() if count},
            "hostile_leases": self.audit.hostile_leases,
            "restarts": dict(self.restarts),
            "memory_beyond_bound": len(self.memory_leaks),
            "memory_growth": round(self.growth, 2),
            "reward": {name: round(value, 3) for name, value in asdict(self.reward).items()} if self.reward else None,
            "em_start": evals[0],
            "em_end": evals[-1],
        }

    def print_report(self, console: Console) -> None:
        """The table, what was found in words, and the JSON line last."""
        console.print(outcome_table(self.outcomes))
        for title, found in (
            ("lost", self.audit.lost),
            ("duplicated", self.audit.duplicated),
            ("unbalanced", self.audit.unbalanced),
            ("hung", self.hung),
            ("memory", self.memory_leaks),
        ):
            for sentence in found:
                console.print(f"{title}: {sentence}", style="red", markup=False, highlight=False)
        print(json.dumps(self.summary_row()), flush=True)


def outcome_table(outcomes: Sequence[FaultOutcome]) -> Table:
    made = Table("#", "fault", "of", "recovered after", "started again", "steps meanwhile", "audit")
    for number, one in enumerate(outcomes, 1):
        made.add_row(
            str(number),
            one.fault.what,
            one.fault.whom,
            f"not: {one.said}" if one.recovery is None else f"{one.recovery:.1f} s",
            ", ".join(f"{part} {count}×" if count > 1 else part for part, count in one.started.items()) or "–",
            str(one.steps),
            "; ".join(one.findings) or "clean",
        )
    return made
