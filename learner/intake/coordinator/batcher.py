"""The batcher: takes batches of the oldest ready groups, at positions that the journal keeps, for the trainer.

ready groups ─► enough for a batch? ─► nothing overdue (`leases/staleness.py`)? ─► positions, durable ─► trainer
"""

from __future__ import annotations

from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.rollout_group import RolloutGroup
from learner.intake.leases.staleness import StalenessBound


class Batcher:
    def __init__(self, table: LeaseTable, leases: JournaledLeases, staleness: StalenessBound) -> None:
        self._table = table
        self._leases = leases
        self._staleness = staleness

    def take_batch(self, position: int, count: int) -> list[RolloutGroup]:
        """Return ``count`` groups from ``position`` on, or none while they are not ready.

        Raises ContractError as `TrainQueue.groups_from`.
        """
        groups = self._table.train_queue.groups_from(position, count)
        if len(groups) < count and self._assign_next(count - len(groups)):
            groups = self._table.train_queue.groups_from(position, count)
        return groups if len(groups) == count else []

    def _assign_next(self, count: int) -> bool:
        """Give the next positions to the ``count`` oldest ready groups; False if they may not be trained yet."""
        queue = self._table.train_queue
        if queue.ready_count < count:
            return False
        if stale := self._staleness.stale_draws():
            self._leases.assign_positions([], stale)
        if not self._staleness.close_overdue_groups(count):
            return False
        self._leases.assign_positions([group.draw for group in queue.ready_groups[:count]], [])
        return True
