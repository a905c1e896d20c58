"""A lease that is expanded in a test, with short delays."""

from __future__ import annotations

import asyncio

from services.environments.search_qa import SearchQA
from services.sampler.expansion.availability import CallTimings
from services.sampler.expansion.expander import Expander, LeaseControl
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText
from treegrpo.core.lease import Lease, LeaseEnd
from treegrpo.core.step import StepStatus, Subtree
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff

FAST = CallTimings(probe_backoff=Backoff((0.001,)), retry_backoff=Backoff((0.0,)))
"""No delay before retries, next to none before probes."""


class ExpansionHarness:
    """An expander with metrics, control and the subtrees it emits."""

    def __init__(
        self, engine: FakeEngine, environment: FakeEnvironment | SearchQA, retries: int = 0, timings: CallTimings = FAST
    ) -> None:
        self.metrics = SamplerMetrics()
        self.control = LeaseControl()
        self.subtrees: list[Subtree] = []
        self.expander = Expander(engine, environment, FakeText(), retries=retries, metrics=self.metrics, timings=timings)
        self.tools, self.engine = self.expander.availability_monitors
        self.changed = asyncio.Event()
        for monitor in self.expander.availability_monitors:
            monitor.on_change = self.changed.set

    async def expand(self, given: Lease) -> LeaseEnd:
        """Expand a lease under this harness's control."""
        return await self.expander.expand_lease(given, self.subtrees.append, self.control)

    async def until_changed(self) -> None:
        """Wait until a part becomes unavailable, or available again."""
        await self.changed.wait()
        self.changed.clear()

    def errors(self, kind: str) -> float | None:
        """Errors of a type that were counted."""
        return self.metrics.registry.get_sample_value("treegrpo_sampler_errors_total", {"type": kind})

    @property
    def failed(self) -> list[StepStatus]:
        """Statuses of failed steps."""
        return [step.status for subtree in self.subtrees for step in subtree.steps if step.status.failed]
