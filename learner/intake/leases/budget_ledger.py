"""The ledger of the rollout budget: granted = spent + refunded + forfeited + outstanding, in tokens and in tool calls.

Pure. `granted`, `spent`, `refunded` and `forfeited` only grow; `outstanding` is kept lease by lease, on its own, so
that the equation is a check and not a definition.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any

from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseKind


@dataclass(slots=True)
class Account:
    """The totals of one lease kind."""

    granted: Budget = field(default_factory=Budget)
    spent: Budget = field(default_factory=Budget)
    refunded: Budget = field(default_factory=Budget)
    forfeited: Budget = field(default_factory=Budget)


class Ledger:
    """The accounts of both lease kinds, and the budget that each open lease has left."""

    def __init__(self) -> None:
        self.accounts = {kind: Account() for kind in LeaseKind}
        self._open: dict[str, tuple[LeaseKind, Budget]] = {}

    def record_grant(self, lease: str, kind: LeaseKind, budget: Budget) -> None:
        """Open the account of a lease with its budget."""
        self._open[lease] = (kind, budget)
        self.accounts[kind].granted += budget

    def record_spend(self, lease: str, budget: Budget) -> None:
        """Charge an open lease. What goes beyond its grant (KV recomputed after a weight swap) is granted on top."""
        kind, left = self._open[lease]
        account = self.accounts[kind]
        account.spent += budget
        if budget.tokens > left.tokens or budget.tool_calls > left.tool_calls:
            extra = Budget(max(0, budget.tokens - left.tokens), max(0, budget.tool_calls - left.tool_calls))
            account.granted += extra
            left += extra
        self._open[lease] = (kind, left - budget)

    def record_late_spend(self, kind: LeaseKind, budget: Budget) -> None:
        """Charge a subtree of a lost lease that is accepted after all.

        It was forfeited with its lease; totals never shrink, so it is granted and spent on top.
        """
        self.accounts[kind].granted += budget
        self.accounts[kind].spent += budget

    def refund_lease(self, lease: str) -> None:
        """Close the account of a lease that ended: what is left is refunded."""
        kind, left = self._open.pop(lease)
        self.accounts[kind].refunded += left

    def forfeit_lease(self, lease: str) -> None:
        """Close the account of a lost lease: how what is left was spent is unknown."""
        kind, left = self._open.pop(lease)
        self.accounts[kind].forfeited += left

    def outstanding(self, kind: LeaseKind) -> Budget:
        lefts = [left for k, left in tuple(self._open.values()) if k is kind]  # a copy: a scrape asks from its own thread
        return Budget(sum(left.tokens for left in lefts), sum(left.tool_calls for left in lefts))

    def imbalance(self, kind: LeaseKind) -> Budget:
        """Granted minus spent, refunded, forfeited and outstanding: 0 unless there is a bug."""
        account = self.accounts[kind]
        return account.granted - account.spent - account.refunded - account.forfeited - self.outstanding(kind)

    def summary(self) -> dict[str, dict[str, dict[str, int]]]:
        """Kind → currency → {granted, spent, refunded, forfeited, outstanding}, for reports."""
        rows: dict[str, dict[str, dict[str, int]]] = {}
        for kind, account in self.accounts.items():
            parts = {name: getattr(account, name) for name in ("granted", "spent", "refunded", "forfeited")}
            parts["outstanding"] = self.outstanding(kind)
            currencies = ("tokens", "tool_calls")
            rows[kind.value] = {c: {name: getattr(budget, c) for name, budget in parts.items()} for c in currencies}
        return rows

    def snapshot_accounts(self) -> dict[str, Any]:
        """Plain data for `restore_accounts`."""
        return {
            "accounts": {kind.value: astuple(account) for kind, account in self.accounts.items()},
            "open": {lease: (kind.value, astuple(left)) for lease, (kind, left) in self._open.items()},
        }

    def restore_accounts(self, row: dict[str, Any]) -> None:
        """Restore what `snapshot_accounts` gave."""
        self.accounts = {kind: Account(*(Budget(*budget) for budget in row["accounts"][kind.value])) for kind in LeaseKind}
        self._open = {lease: (LeaseKind(kind), Budget(*left)) for lease, (kind, left) in row["open"].items()}
