"""The leases that are open, and who holds them. Pure."""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Iterable, KeysView

from learner.intake.leases.rollout_group import OpenGroup
from treegrpo.core.lease import LeaseKind


class Holdings(UserDict[str, OpenGroup]):
    """Open groups by lease. Holder, kind and `OpenGroup.closed` of an entry never change; another takes its place."""

    def __init__(self, groups: Iterable[OpenGroup] = ()) -> None:
        self._held: dict[str, dict[str, OpenGroup]] = {}
        self._wanted: Counter[LeaseKind] = Counter()
        super().__init__({group.lease.id: group for group in groups})

    def __setitem__(self, lease: str, group: OpenGroup) -> None:
        if (before := self.data.get(lease)) is not None:
            self._forget(lease, before)
        self.data[lease] = group
        self._held.setdefault(group.holder, {})[lease] = group
        self._wanted[group.lease.kind] += not group.closed

    def __delitem__(self, lease: str) -> None:
        self._forget(lease, self.data.pop(lease))

    def _forget(self, lease: str, group: OpenGroup) -> None:
        held = self._held[group.holder]
        del held[lease]
        if not held:
            del self._held[group.holder]
        self._wanted[group.lease.kind] -= not group.closed

    @property
    def holders(self) -> KeysView[str]:
        """Those that hold any."""
        return self._held.keys()

    def of(self, holder: str) -> list[OpenGroup]:
        """The groups a sampler works on."""
        return list(self._held.get(holder, {}).values())

    def held(self, holder: str) -> int:
        """How many those are."""
        return len(self._held.get(holder, ()))

    def wanted(self, kind: LeaseKind) -> int:
        """Those of a kind whose work is still wanted."""
        return self._wanted[kind]
