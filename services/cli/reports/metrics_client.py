"""HTTP client of the learner's /metrics pages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from prometheus_client.parser import text_string_to_metric_families

from treegrpo.config.security import Role
from treegrpo.errors import ContractError, DeadlineError, UnavailableError
from treegrpo.net.address import reachable_address
from treegrpo.net.http_client import HttpClient, HttpResponse
from treegrpo.security.credentials import Credentials, bearer_header

SCRAPE_SECONDS = 1.0
METRICS_BYTES = 4 << 20

MetricSamples = Mapping[str, float]
"""Samples of a /metrics page by name and labels, sorted by label: ``treegrpo_budget_spent_total/tokens/train``."""
ReadMetrics = Callable[[str], Awaitable[MetricSamples]]
"""Reads the page at an address; an empty mapping while it does not answer, since callers can do without."""


def parse_metrics(text: str) -> MetricSamples:
    """Parse a /metrics page."""
    return {
        "/".join((sample.name, *(value for _, value in sorted(sample.labels.items())))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _samples(page: HttpResponse) -> MetricSamples:
    try:
        return parse_metrics(page.text) if page.ok else {}
    except (ValueError, IndexError):  # the parser has no error of its own
        return {}


@asynccontextmanager
async def open_metrics_client(access: Credentials, timeout: float = SCRAPE_SECONDS) -> AsyncGenerator[ReadMetrics]:  # noqa: ASYNC109 - of each request
    """A function that reads pages, for the time of the block. ``timeout``: seconds for one page."""
    scheme = "http" if access.keys is None else "https"
    async with HttpClient(verify=access.web_context(Role.LEARNER), headers=bearer_header(access.metrics_token)) as client:

        async def read(address: str) -> MetricSamples:
            url = f"{scheme}://{reachable_address(address)}/metrics"
            try:
                return await client.request("GET", url, _samples, seconds=timeout, size=METRICS_BYTES)
            except (UnavailableError, DeadlineError, ContractError):
                return {}

        yield read
