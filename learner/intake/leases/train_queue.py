"""The train queue: closed training groups, ready or at a position in the trainer's order. Pure.

Which ready groups get the next *positions* is decided when the trainer asks (`staleness.py`), and kept: a trainer that
starts again gets the same groups at the same positions. A group is kept until two checkpoints cover it, for a trainer
that has to start from the checkpoint before its newest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from treegrpo.errors import ContractError


class TrainQueue:
    """Closed training groups, from the trainer's last checkpoint but one on."""

    def __init__(self) -> None:
        self._positioned: deque[RolloutGroup] = deque()
        """Those with a position, from `_first_position` on."""
        self._ready: dict[int, RolloutGroup] = {}
        """Those without, by draw."""
        self._ready_order: list[tuple[int, int]] = []
        """Their policy steps and draws, ascending."""
        self._first_position = 0
        self._covered_position = 0
        self._trained_position = 0

    # ---- counts

    @property
    def end_position(self) -> int:
        """The next position to be given."""
        return self._first_position + len(self._positioned)

    @property
    def closed_count(self) -> int:
        """Training groups closed since the run began."""
        return self.end_position + len(self._ready)

    @property
    def untrained_count(self) -> int:
        """Groups that are ready or in training."""
        return self.closed_count - self._trained_position

    @property
    def in_training_count(self) -> int:
        """Groups that have a position and are not trained yet."""
        return self.end_position - self._trained_position

    @property
    def ready_count(self) -> int:
        """Groups without a position."""
        return len(self._ready)

    @property
    def ready_groups(self) -> list[RolloutGroup]:
        """Groups without a position, oldest policy first."""
        return [self._ready[draw] for _, draw in self._ready_order]

    # ---- events

    def add_ready(self, group: RolloutGroup) -> None:
        """Add a closed group. Raises ContractError: its state does not allow it."""
        group.move_to(GroupState.READY)
        self._insert_ready(group)

    def assign_positions(self, draws: Sequence[int]) -> None:
        """Give the next positions to these ready groups. Raises ContractError at one that is not ready."""
        for draw in draws:
            group = self._remove_ready(draw)
            group.move_to(GroupState.IN_TRAINING)
            group.drop_trees()
            self._positioned.append(group)

    def set_aside_ready(self, draw: int) -> RolloutGroup:
        """Set a ready group aside. Raises ContractError if it is not ready."""
        group = self._remove_ready(draw)
        group.move_to(GroupState.SET_ASIDE)
        return group

    def groups_from(self, position: int, count: int) -> list[RolloutGroup]:
        """The groups at ``position`` and after it, up to ``count`` of them; those before it are trained.

        They are fewer until more are given a position.

        Raises:
            ContractError: they were forgotten, because two checkpoints said they would not be asked for again; or the
                trainer is ahead of the journal, a part of which must be missing.
        """
        if position < self._first_position:
            raise ContractError(
                f"Position {position} is no longer kept; resume from the checkpoint at position {self._first_position} or later."
            )
        if position > self.end_position:
            raise ContractError(
                f"The trainer is at position {position}, but the journal ends at {self.end_position}: restore its "
                "newest part, or begin a new run from the last checkpoint (model.path)."
            )
        self._trained_position = position
        first = position - self._first_position
        return list(islice(self._positioned, first, first + count))

    def mark_trained(self, position: int) -> None:
        """Note that a step has trained everything before ``position``; after a crash the trainer may request it again."""
        self._trained_position = position

    def mark_covered(self, position: int) -> None:
        """Note that a checkpoint covers everything before ``position``: drop what the checkpoint before it covered.

        A trainer that went back names a smaller position than before, and needs everything from there on.
        """
        while self._first_position < self._covered_position < position and self._positioned:
            self._positioned.popleft()
            self._first_position += 1
        self._covered_position = position

    def _insert_ready(self, group: RolloutGroup) -> None:
        self._ready[group.draw] = group
        insort(self._ready_order, (group.min_policy_step, group.draw))

    def _remove_ready(self, draw: int) -> RolloutGroup:
        if draw not in self._ready:
            raise ContractError(f"Group {draw:07d} is not ready; it cannot be given to the trainer.")
        group = self._ready.pop(draw)
        del self._ready_order[bisect_left(self._ready_order, (group.min_policy_step, draw))]
        return group

    # ---- snapshots

    def kept_groups(self) -> list[RolloutGroup]:
        """The groups that may be requested: those with a position, in order, then those that are ready."""
        return [*self._positioned, *self._ready.values()]

    def snapshot_positions(self) -> dict[str, Any]:
        """Plain data for `restore_positions`, together with `kept_groups`."""
        return {"kept": self._first_position, "covered": self._covered_position, "in_line": len(self._positioned)}

    def restore_positions(self, row: dict[str, Any], groups: Sequence[RolloutGroup]) -> None:
        """Restore what `snapshot_positions` and `kept_groups` gave, with groups that are ready.

        The trainer names its position when it connects again.
        """
        self._first_position, self._covered_position = row["kept"], row["covered"]
        for group in groups:
            self._insert_ready(group)
        self.assign_positions([group.draw for group in groups[: row["in_line"]]])
