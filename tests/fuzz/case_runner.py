"""Runs the cases of a fuzz target and counts their outcomes."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.loop_watchdog import STALL_SECONDS, watched

BATCH = 500
"""Hypothesis remembers all cases of one run; so it runs often."""
SLOW_SECONDS = 15.0
"""A case that takes longer hangs: no server is as patient, and other processes may have the machine meanwhile."""


@dataclass
class CaseCounts:
    name: str
    cases: int = 0
    slowest: float = 0.0
    crashes: list[str] = field(default_factory=list[str])
    hangs: int = 0
    stalls: int = 0
    """Cases that keep an event loop for longer than `watchdog.STALL_SECONDS`, or what a watched server says of its own."""
    growth_mib: float = 0.0
    peak_mib: float = 0.0
    """The most that a case needs while it is looked at."""
    seconds: float = 0.0


@contextmanager
def without_garbage_collection() -> Generator[None]:
    """No garbage is collected in the block: that of the tests is large, and looking through it is no work on the case."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(case: Callable[[Any], None], data: Any) -> tuple[float, float]:
    """Seconds that ``case`` takes on ``data``, and for how long it keeps an event loop at most."""
    started, busy = time.monotonic(), time.thread_time()
    with watched() as dog, without_garbage_collection():
        case(data)
    took = time.monotonic() - started
    return took, dog.longest if dog.seen else time.thread_time() - busy  # what has no loop is one callback of somebody's


def run_cases(
    count: CaseCounts,
    made: st.SearchStrategy[Any],
    case: Callable[[Any], None],
    cases: int,
    first_seed: int = 0,
    *,
    watch: bool = True,
) -> None:
    """Feed ``cases`` of ``made`` to ``case``. A crash ends a batch, with its smallest example, and counts once.

    With ``watch`` a case that keeps an event loop for too long is counted: all that it does is on one, but for its threads."""
    began = time.monotonic()

    def one(data: Any) -> None:
        took, longest = timed(case, data)
        if watch and longest > STALL_SECONDS:  # work on the same bytes takes as long again, a hiccup of the machine does not
            longest = min(longest, timed(case, data)[1])
        count.stalls += watch and longest > STALL_SECONDS
        count.cases += 1
        count.slowest = max(count.slowest, took)
        count.hangs += took > SLOW_SECONDS

    for batch in range(0, cases, BATCH):
        quiet = settings(
            max_examples=min(BATCH, cases - batch),
            database=None,
            deadline=None,
            suppress_health_check=tuple(cast("Collection[HealthCheck]", HealthCheck)),
            phases=(Phase.generate, Phase.shrink),
        )
        try:
            seed(first_seed + batch)(quiet(given(made)(one)))()
        except BaseException as error:  # whatever it is, it is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            count.crashes.append("".join(traceback.format_exception(error)))
    count.seconds += time.monotonic() - began
