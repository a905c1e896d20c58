"""What the trees of a lease may spend, have spent, and have already told the learner."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease
from treegrpo.errors import AwayError, ToolError


class Allowance:
    """One tree's part of a lease's grant against what its branches cost.

    Every running expansion claims one more step, so that branches that start together do not count on the same rest.
    A branch that has begun is finished: the grant bounds what is started.
    """

    @classmethod
    def per_tree(cls, lease: Lease) -> list[Allowance]:
        """The allowance of each tree: an equal part of what the group may cost, less what its accepted subtrees have cost.

        What one tree has left is not for the others: which branches are made must not depend on which tree was quicker, nor on
        how many leases the group took.
        """
        trees = ([subtree.cost for subtree in lease.accepted if subtree.tree == tree] for tree in range(lease.plan.trees))
        costs = [Budget.for_cost(Cost.total(accepted)) for accepted in trees]
        part = sum(costs, lease.grant) // lease.plan.trees
        return [cls(part - cost) for cost in costs]

    def __init__(self, grant: Budget) -> None:
        self._grant = grant
        self._claimed = Budget()
        self._bills: list[Bill] = []
        self.spent = Cost()

    def claim(self, step: Budget) -> bool:
        """Set ``step`` aside for a new expansion; False if the grant does not cover it."""
        rest = self._grant - Budget.for_cost(self.spent) - self._claimed - step
        if rest.tokens < 0 or rest.tool_calls < 0:
            return False
        self._claimed += step
        return True

    def release(self, step: Budget) -> None:
        """Give back what a finished expansion had claimed."""
        self._claimed -= step

    def bill(self) -> Bill:
        """A new branch's account."""
        self._bills.append(Bill(self))
        return self._bills[-1]

    @property
    def unaccounted(self) -> Cost:
        """Spent by branches whose steps never reached the learner."""
        return sum((bill.total for bill in self._bills if not bill.settled), Cost())


class Bill:
    """What one branch costs, step by step, as it arises."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._step = Cost()
        self.total = Cost()
        self.settled = False
        """True once the branch's subtree carries these costs to the learner."""

    def charge(self, cost: Cost) -> None:
        self._step += cost
        self.total += cost
        self._allowance.spent += cost

    def close_step(self) -> Cost:
        """What was charged since the last call: the cost of the step that ends here."""
        cost, self._step = self._step, Cost()
        return cost


@contextlib.contextmanager
def charged(bill: Bill, call: Cost) -> Generator[None]:
    """Charge a tool call that failed: it was made, whatever became of it, unless the tool was not there."""
    try:
        yield
    except AwayError:
        raise
    except ToolError:
        bill.charge(call)
        raise
