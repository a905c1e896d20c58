"""What a chaos run says in the end: a table of its faults and what became of them, and one line of JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, variance

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import Audit, Row
from tests.chaos.driver import Outcome


@dataclass(frozen=True, slots=True)
class Direction:
    """How a value changed over the steps of a run."""

    first: float
    """Mean of the first third."""
    last: float
    """Mean of the last third."""
    half_width: float
    """Of the 95 % interval of the difference (Welch, steps taken as independent)."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Direction | None:
        """None if there are too few."""
        if (third := len(values) // 3) < 2:
            return None
        first, last = values[:third], values[-third:]
        return cls(mean(first), mean(last), 1.96 * math.sqrt(variance(first) / third + variance(last) / third))


@dataclass(slots=True)
class Verdict:
    seed: int
    outcomes: list[Outcome]
    found: Audit
    restarts: Counter[str]
    hung: list[str] = field(default_factory=list[str])
    """What did not recover, or did not end."""
    grown: list[str] = field(default_factory=list[str])
    growth: float = 1.0

    @property
    def good(self) -> bool:
        return self.found.clean and not (self.hung or self.grown or self.declined)

    @property
    def reward(self) -> Direction | None:
        return Direction.of([line["reward_mean"] for line in self.found.chain])

    @property
    def declined(self) -> bool:
        """The reward fell by more than chance explains. Whether it rises is for a long run to show."""
        return self.reward is not None and self.reward.last - self.reward.first + self.reward.half_width < 0

    def row(self) -> Row:
        """The line of JSON."""
        evals = [line["em"] for line in self.found.evals] or [None]
        recoveries = [outcome.recovery for outcome in self.outcomes if outcome.recovery is not None]
        return {
            "faults": len(self.outcomes),
            "lost": len(self.found.lost),
            "duplicated": len(self.found.duplicated),
            "unbalanced": len(self.found.unbalanced),
            "hung": len(self.hung),
            "max_recovery_s": round(max(recoveries, default=0.0), 1),
            "seed": self.seed,
            "steps": len(self.found.chain) + self.found.unreported,
            "steps_unreported": self.found.unreported,
            "groups_trained": self.found.trained,
            "groups_accounted": {why: count for why, count in self.found.accounted.items() if count},
            "hostile_leases": self.found.hostile_leases,
            "restarts": dict(self.restarts),
            "memory_beyond_bound": len(self.grown),
            "memory_growth": round(self.growth, 2),
            "reward": {name: round(value, 3) for name, value in asdict(self.reward).items()} if self.reward else None,
            "em_start": evals[0],
            "em_end": evals[-1],
        }

    def show(self, console: Console) -> None:
        """The table, what was found in words, and the JSON line last."""
        console.print(table(self.outcomes))
        for title, found in (
            ("lost", self.found.lost),
            ("duplicated", self.found.duplicated),
            ("unbalanced", self.found.unbalanced),
            ("hung", self.hung),
            ("memory", self.grown),
        ):
            for sentence in found:
                console.print(f"{title}: {sentence}", style="red", markup=False, highlight=False)
        print(json.dumps(self.row()), flush=True)


def table(outcomes: Sequence[Outcome]) -> Table:
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
