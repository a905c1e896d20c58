"""Which groups train next: the oldest, and none beyond the staleness bound. Pure.

A step that begins from policy step ``base`` takes ``batch`` groups. A group that may hold tokens of policy step ``a``
can be trained by it iff base − a ≤ max_lag. So for each j below max_lag, of all groups with a ≤ base − max_lag + j no more
than j·batch may be left for the j steps after this one; the others belong into this batch, now. For j = max_lag that
is the rule by which leases are granted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def pressing(open_ages: Sequence[int], ready_ages: Sequence[int], base: int, batch: int, count: int, max_lag: int) -> int:
    """How many of the oldest open groups have to close before ``count`` of the ready ones may be trained from ``base``.

    Each age list is ascending; ``count`` is at most ``batch``. Closing an open group makes it ready, or takes it away.

    Example:
        >>> pressing([0, 1], [1, 1], base=1, batch=2, count=2, max_lag=1)  # the 0 has no later step to go to
        1
    """
    worst = 0
    for later in range(max_lag):
        level = base - max_lag + later
        still_open, ready = bisect_right(open_ages, level), bisect_right(ready_ages, level)
        too_many = still_open + ready - later * batch - min(count, ready)
        worst = max(worst, min(still_open, too_many))
    return worst
