"""The index of open leases by id and by the sampler that holds them. Pure."""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Iterable, KeysView

from learner.intake.leases.rollout_group import GroupState, RolloutGroup
from treegrpo.core.lease import LeaseKind


class OpenLeaseIndex(UserDict[str, RolloutGroup]):
    """Groups by the id of their open lease. Holder, kind and state of an entry change only after it is removed or replaced."""

    def __init__(self, groups: Iterable[RolloutGroup] = ()) -> None:
        self._by_holder: dict[str, dict[str, RolloutGroup]] = {}
        self._active = Counter[LeaseKind]()
        super().__init__({group.lease.id: group for group in groups})

    def __setitem__(self, lease: str, group: RolloutGroup) -> None:
        if (before := self.data.get(lease)) is not None:
            self._unindex(lease, before)
        self.data[lease] = group
        self._by_holder.setdefault(group.holder, {})[lease] = group
        self._active[group.lease.kind] += group.state is GroupState.LEASED

    def __delitem__(self, lease: str) -> None:
        self._unindex(lease, self.data.pop(lease))

    def _unindex(self, lease: str, group: RolloutGroup) -> None:
        held = self._by_holder[group.holder]
        del held[lease]
        if not held:
            del self._by_holder[group.holder]
        self._active[group.lease.kind] -= group.state is GroupState.LEASED

    @property
    def holders(self) -> KeysView[str]:
        """Those that hold any."""
        return self._by_holder.keys()

    def held_by(self, holder: str) -> list[RolloutGroup]:
        """The groups a sampler works on."""
        return list(self._by_holder.get(holder, {}).values())

    def count_held_by(self, holder: str) -> int:
        """How many those are."""
        return len(self._by_holder.get(holder, ()))

    def count_active(self, kind: LeaseKind) -> int:
        """Leases of a kind whose group is not closed yet."""
        return self._active[kind]
