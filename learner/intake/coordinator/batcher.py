"""Batches for the trainer: the oldest groups that are ready, at positions that the journal keeps.

ready groups ─► enough for a batch? ─► nobody pressing? ─► positions, durable ─► trainer
                                       │
                  told to stop ◄───────┤ a group for which there is no later step
                  closed early ◄───────┘ the same, FINISHING_SECONDS after it was told, or if nobody works on it
"""

from __future__ import annotations

import time
from collections.abc import Callable

from learner.intake.coordinator.journaled_leases import Clerk
from learner.intake.coordinator.timings import FINISHING_SECONDS
from learner.intake.leases.lease_table import LeaseBook
from learner.intake.leases.rollout_group import OpenGroup


class Batches:
    def __init__(
        self,
        book: LeaseBook,
        clerk: Clerk,
        stop: Callable[[OpenGroup], None],
        finishing_seconds: float = FINISHING_SECONDS,
    ) -> None:
        """``stop`` tells the holder of a group to expand it no further; it may finish its branches for ``finishing_seconds``."""
        self._book = book
        self._clerk = clerk
        self._stop = stop
        self._finishing_seconds = finishing_seconds

    def press(self) -> None:
        """Have stopped what a whole batch is waiting for, and close what nobody works on."""
        for group in self._book.overdue():
            if group.draw in self._book.unfinished:
                if group in self._book.movable:  # else the trainer is steps away from wanting it
                    self._clerk.close(group.draw)
            elif group.told_at is None:
                group.told_at = time.monotonic()
                self._stop(group)

    def batch(self, position: int, count: int) -> list[OpenGroup]:
        """``count`` groups from ``position`` on, or none while they are not ready. Raises ContractError as `GroupQueue.take`."""
        groups = self._book.groups.take(position, count)
        if len(groups) < count and self._assign(count - len(groups)):
            groups = self._book.groups.take(position, count)
        return groups if len(groups) == count else []

    def _assign(self, count: int) -> bool:
        """Give the next positions to ``count`` ready groups; False if it is too early."""
        if self._book.groups.ready_count < count:
            return False
        if stale := self._book.stale():
            self._clerk.give([], stale)
        self.press()
        while self._book.groups.ready_count >= count:
            pressing = self._book.pressing(count)
            if not pressing:
                self._clerk.give([group.draw for group in self._book.groups.ready[:count]], [])
                return True
            if any(self._patience(group) > 0 for group in pressing if group.draw not in self._book.unfinished):
                return False
            for group in pressing:
                self._clerk.close(group.draw)
        return False

    @property
    def patience(self) -> float:
        """time.monotonic when the next group that was told to stop may be closed."""
        if not self._book.overdue():
            return float("inf")
        told = [group.told_at for group in self._book.open.values() if group.told_at is not None and not group.closed]
        closable = [at + self._finishing_seconds for at in told]
        return min((at for at in closable if at > time.monotonic()), default=float("inf"))

    def _patience(self, group: OpenGroup) -> float:
        """Seconds that a group's sampler still has; one that was not told has all of them."""
        if group.told_at is None:
            return self._finishing_seconds
        return group.told_at + self._finishing_seconds - time.monotonic()
