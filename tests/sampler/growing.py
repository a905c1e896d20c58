"""A lease that grows while a test looks on."""

from __future__ import annotations

import asyncio

from services.environments.search_qa import SearchQA
from services.sampler.expansion.expander import Expander, Gate
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText
from treegrpo.core.lease import Lease, LeaseEnd
from treegrpo.core.step import StepStatus, Subtree
from treegrpo.observability.metrics import SamplerMetrics


class Growing:
    def __init__(self, engine: FakeEngine, environment: FakeEnvironment | SearchQA) -> None:
        self.metrics = SamplerMetrics()
        self.gate = Gate()
        self.subtrees: list[Subtree] = []
        self.expander = Expander(engine, environment, FakeText(), retries=0, metrics=self.metrics)
        self.tools, self.engine = self.expander.outages
        self.changed = asyncio.Event()
        for part in self.expander.outages:
            part.on_change = self.changed.set

    async def grow(self, given: Lease) -> LeaseEnd:
        return await self.expander.grow(given, self.subtrees.append, self.gate)

    async def until_away(self) -> None:
        await self.changed.wait()
        self.changed.clear()

    def errors(self, kind: str) -> float | None:
        return self.metrics.registry.get_sample_value("treegrpo_sampler_errors_total", {"type": kind})

    @property
    def failed(self) -> list[StepStatus]:
        return [step.status for subtree in self.subtrees for step in subtree.steps if step.status.failed]
