"""Cost accounting of a lease: the budgets of its trees, their spending, and its report to the learner."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease
from treegrpo.errors import AwayError, ToolError


class TreeBudget:
    """One tree's part of a lease's grant, less what its branches cost.

    Every running expansion reserves its first step, so that branches that start together do not count on the same
    remainder. A branch that has started is finished: the grant bounds what is started.
    """

    @classmethod
    def for_lease(cls, lease: Lease) -> list[TreeBudget]:
        """One budget for each tree. All trees get the same part of what the group may cost, and no tree uses another's
        remainder: which branches are made must not depend on which tree was quicker, nor on how many leases they took.
        """
        costs = [
            Budget.for_cost(Cost.total([s.cost for s in lease.accepted if s.tree == tree])) for tree in range(lease.plan.trees)
        ]
        part = sum(costs, lease.grant) // lease.plan.trees
        return [cls(part - cost) for cost in costs]

    def __init__(self, grant: Budget) -> None:
        self._grant = grant
        self._reserved = Budget()
        self._meters: list[BranchCostMeter] = []
        self.spent = Cost()

    def reserve_step(self, step: Budget) -> bool:
        """Set ``step`` aside for a new expansion; False if the grant does not cover it."""
        remainder = self._grant - Budget.for_cost(self.spent) - self._reserved - step
        if remainder.tokens < 0 or remainder.tool_calls < 0:
            return False
        self._reserved += step
        return True

    def release_step(self, step: Budget) -> None:
        """Release what a finished expansion had reserved."""
        self._reserved -= step

    def start_meter(self) -> BranchCostMeter:
        """The cost meter of a new branch."""
        self._meters.append(BranchCostMeter(self))
        return self._meters[-1]

    @property
    def unaccounted(self) -> Cost:
        """The cost of branches whose steps never reached the learner."""
        return sum((meter.total for meter in self._meters if not meter.delivered), Cost())


class BranchCostMeter:
    """Adds up what one branch costs, step by step."""

    def __init__(self, budget: TreeBudget) -> None:
        self._budget = budget
        self._step = Cost()
        self.total = Cost()
        self.delivered = False
        """True once the branch's subtree carries these costs to the learner."""

    def charge(self, cost: Cost) -> None:
        """Add ``cost`` to the current step."""
        self._step += cost
        self.total += cost
        self._budget.spent += cost

    def take_step_cost(self) -> Cost:
        """End the current step: what was charged since the last call."""
        cost, self._step = self._step, Cost()
        return cost


@contextlib.contextmanager
def charge_failed_call(meter: BranchCostMeter, call: Cost) -> Generator[None]:
    """Charge ``call`` when the block raises ToolError: the call was made, unless the tool was unavailable (AwayError)."""
    try:
        yield
    except AwayError:
        raise
    except ToolError:
        meter.charge(call)
        raise
