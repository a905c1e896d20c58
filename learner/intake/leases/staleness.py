"""The staleness bound: which groups train next, and which close early for them. Pure, but for the clock it is given.

A step that begins from policy step ``base`` takes ``batch`` groups. A group that may hold tokens of policy step ``a``
can be trained by it iff base − a ≤ max_lag. So for each j below max_lag, of all groups with a ≤ base − max_lag + j no more
than j·batch may be left for the j steps after this one; the others belong into this batch, now. For j = max_lag that
is the rule by which leases are granted.

    a group for which there is no later step ─► its sampler is asked to stop ─► FINISHING_SECONDS later it is closed
    the same, and no lease is open for it    ─► it is closed at once
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from treegrpo.core.lease import SILENCE_SECONDS, LeaseKind

FINISHING_SECONDS = SILENCE_SECONDS
"""What a sampler gets to finish the branches it is in the middle of while a whole batch waits for them."""


def count_groups_to_close(
    open_steps: Sequence[int], ready_steps: Sequence[int], base: int, batch: int, count: int, max_lag: int
) -> int:
    """How many of the oldest open groups have to close before ``count`` of the ready ones may be trained from ``base``.

    Each list of policy steps is ascending; ``count`` is at most ``batch``. Closing an open group makes it ready, or takes it
    away.

    Example:
        >>> count_groups_to_close([0, 1], [1, 1], base=1, batch=2, count=2, max_lag=1)  # the 0 has no later step to go to
        1
    """
    worst = 0
    for later in range(max_lag):
        level = base - max_lag + later
        still_open, ready = bisect_right(open_steps, level), bisect_right(ready_steps, level)
        too_many = still_open + ready - later * batch - min(count, ready)
        worst = max(worst, min(still_open, too_many))
    return worst


class StalenessBound:
    """Closes the groups that others would push beyond the bound; the only place where a group closes before its lease ends."""

    def __init__(
        self,
        table: LeaseTable,
        close_group: Callable[[int], object],
        request_stop: Callable[[RolloutGroup], None],
        *,
        finishing_seconds: float = FINISHING_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``close_group`` closes the group of a draw; ``request_stop`` asks the sampler of a group to expand it no further."""
        self._table = table
        self._close_group = close_group
        self._request_stop = request_stop
        self._finishing_seconds = finishing_seconds
        self._clock = clock

    def groups_to_close(self, count: int) -> list[RolloutGroup]:
        """The groups that have to close before ``count`` ready ones may be trained, since there is no later step for them."""
        table = self._table
        leased = (g for g in table.open_leases.values() if g.lease.kind is LeaseKind.TRAIN and g.state is GroupState.LEASED)
        unfinished = table.unfinished_groups.values()
        begun = [group for group in (*leased, *unfinished) if group.min_policy_step < table.base_policy_step]
        begun.sort(key=lambda group: (group.min_policy_step, group.draw))
        open_steps = [group.min_policy_step for group in begun]
        ready_steps = [group.min_policy_step for group in table.train_queue.ready_groups]
        number = count_groups_to_close(open_steps, ready_steps, table.base_policy_step, table.batch, count, table.max_lag)
        return begun[:number]

    def overdue_groups(self) -> list[RolloutGroup]:
        """The groups that a whole batch is waiting for: it is ready, and may not be trained before them."""
        if self._table.version is None or self._table.train_queue.ready_count < self._table.batch:
            return []
        return self.groups_to_close(self._table.batch)

    def stale_draws(self) -> list[int]:
        """Ready draws beyond the bound, which happens if ``max_lag`` or ``batch`` were lowered between two starts."""
        base, max_lag = self._table.base_policy_step, self._table.max_lag
        return [group.draw for group in self._table.train_queue.ready_groups if base - group.min_policy_step > max_lag]

    def enforce_bound(self) -> None:
        """Ask samplers to stop groups that a whole batch waits for, and close those without an open lease."""
        for group in self.overdue_groups():
            if group.state is GroupState.AWAITING_LEASE:
                if group in self._table.resumable_groups:  # else the trainer is steps away from needing it
                    self._close_group(group.draw)
            elif group.stop_requested_at is None:
                group.stop_requested_at = self._clock()
                self._request_stop(group)

    def close_overdue_groups(self, count: int) -> bool:
        """Close what has to close before ``count`` ready groups may be trained; False while they may not be yet."""
        self.enforce_bound()
        while self._table.train_queue.ready_count >= count:
            groups = self.groups_to_close(count)
            if not groups:
                return True
            if any(self._seconds_left(group) > 0 for group in groups if group.state is GroupState.LEASED):
                return False
            for group in groups:
                self._close_group(group.draw)
        return False

    @property
    def next_deadline(self) -> float:
        """The clock's time when the next group whose sampler was asked to stop may be closed."""
        if not self.overdue_groups():
            return float("inf")
        now, leased = self._clock(), [g for g in self._table.open_leases.values() if g.state is GroupState.LEASED]
        asked = [group.stop_requested_at + self._finishing_seconds for group in leased if group.stop_requested_at is not None]
        return min((at for at in asked if at > now), default=float("inf"))

    def _seconds_left(self, group: RolloutGroup) -> float:
        """Seconds that a group's sampler still has; one that was not asked to stop has all of them."""
        if group.stop_requested_at is None:
            return self._finishing_seconds
        return group.stop_requested_at + self._finishing_seconds - self._clock()
