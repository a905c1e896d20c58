"""What a chaos run says in the end: a table of its faults and what became of them, and one line of JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, variance

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import Audit, Row
from tests.chaos.driver import Outcome


@dataclass(slots=True)
class Verdict:
    seed: int
    outcomes: list[Outcome]
    found: Audit
    restarts: Counter[str]
    hung: list[str] = field(default_factory=list[str])
    """What did not recover, or did not end."""
    grown: list[str] = field(default_factory=list[str])

    @property
    def good(self) -> bool:
        return self.found.clean and not (self.hung or self.grown or self.declined)

    @property
    def reward(self) -> tuple[float, float, float]:
        """Mean reward of the first and of the last third of the steps, and the half width of the 95 % interval of the
        difference (Welch's standard error, steps taken as independent)."""
        return compare([line["reward_mean"] for line in self.found.chain])

    @property
    def declined(self) -> bool:
        """The reward fell by more than chance explains. That it rose is seen in a long run only."""
        first, last, half = self.reward
        return last - first + half < 0

    def row(self) -> Row:
        """The line of JSON."""
        first, last, half = self.reward
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
            "restarts": dict(self.restarts),
            "memory_beyond_bound": len(self.grown),
            "reward_first_third": round(first, 3),
            "reward_last_third": round(last, 3),
            "reward_difference_95": round(half, 3),
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
        links = f" ({', '.join(f'{client}→{service}' for client, service in one.fault.links)})" if one.fault.links else ""
        made.add_row(
            str(number),
            one.fault.what,
            " and ".join(one.fault.parts) + links,
            f"not: {one.said}" if one.recovery is None else f"{one.recovery:.1f} s",
            ", ".join(f"{part} {count}×" if count > 1 else part for part, count in one.started.items()) or "–",
            str(one.steps),
            "; ".join(one.findings) or "clean",
        )
    return made


def compare(values: Sequence[float]) -> tuple[float, float, float]:
    """Means of the first and the last third, and the half width of the 95 % interval of their difference."""
    third = len(values) // 3
    if third < 2:
        return math.nan, math.nan, math.nan
    first, last = values[:third], values[-third:]
    return mean(first), mean(last), 1.96 * math.sqrt(variance(first) / third + variance(last) / third)
