"""Groups: open while their lease runs, then in line for the trainer. Pure.

A closed training group gets the next *position*. The trainer takes groups by position and says up to which position a
checkpoint covers them; until then a group is kept, so a trainer that starts again gets it again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

from treegrpo.budget import Cost
from treegrpo.errors import ContractError
from treegrpo.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.tree import Group, Subtree


@dataclass(slots=True, eq=False)
class OpenGroup:
    """A question being rolled out under a lease."""

    lease: Lease
    draw: int
    """The number of its draw in the question queue; −1 for evaluation."""
    holder: str
    """The sampler, with its incarnation."""
    granted_at: float | None
    """time.monotonic of the grant; None when it is read from the journal."""
    group: Group = field(init=False)
    subtrees: list[Subtree] = field(default_factory=list[Subtree])
    told_to_stop: bool = False
    refused: dict[tuple[int, int], Cost] = field(default_factory=dict[tuple[int, int], Cost])
    """By (tree, index): what subtrees cost that are no part of the group."""
    refusal: str = ""
    """Why the last of them is none."""

    def __post_init__(self) -> None:
        self.group = Group(f"{self.draw:07d}" if self.draw >= 0 else self.lease.id, self.lease.question)

    def add(self, subtree: Subtree) -> bool:
        """Accept a subtree; False if it was there already. Raises ContractError."""
        fresh = self.group.add(subtree)
        if fresh:
            self.subtrees.append(subtree)
        return fresh

    def refuse(self, key: tuple[int, int], cost: Cost, why: str) -> bool:
        """Leave a subtree out; False if it was refused before."""
        fresh = key not in self.refused
        self.refused[key], self.refusal = cost, why
        return fresh

    @property
    def has_leaves(self) -> bool:
        """Whether any episode came to its end."""
        return any(subtree.leaves for subtree in self.subtrees)

    def settle(self, end: LeaseEnd) -> LeaseEnd:
        """``end`` with what refused subtrees cost; a lease of which nothing else came has failed."""
        end = replace(end, unaccounted=sum(self.refused.values(), end.unaccounted))
        if not self.refused or self.has_leaves:
            return end
        return replace(
            end, reason=LeaseEndReason.FAILED, error=f"{len(self.refused)} subtrees refused, the last so: {self.refusal}"
        )


class GroupQueue:
    """Closed training groups, from the trainer's last checkpoint on."""

    def __init__(self) -> None:
        self._groups: deque[OpenGroup] = deque()
        self._kept = 0
        self._trained = 0

    @property
    def end(self) -> int:
        """The position that the next closed group gets: training groups closed since the run began."""
        return self._kept + len(self._groups)

    @property
    def waiting(self) -> int:
        """Groups that are ready or in training."""
        return self.end - self._trained

    def close(self, group: OpenGroup) -> None:
        self._groups.append(group)

    def take(self, position: int, count: int) -> list[OpenGroup]:
        """``count`` groups from ``position`` on, or none while there are fewer.

        Raises:
            ContractError: they were forgotten, because a checkpoint said they would not be asked for again.
        """
        if position < self._kept:
            raise ContractError(
                f"Position {position} is gone: a checkpoint covers everything before {self._kept}. Resume from that."
            )
        self._trained = position
        first = position - self._kept
        groups = list(islice(self._groups, first, first + count))
        return groups if len(groups) == count else []

    def trained(self, position: int) -> None:
        """A step has trained everything before ``position``; a trainer that crashes may still ask for it again."""
        self._trained = position

    def forget(self, position: int) -> None:
        """A checkpoint covers everything before ``position``."""
        while self._groups and self._kept < position:
            self._groups.popleft()
            self._kept += 1
