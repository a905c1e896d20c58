"""The /metrics pages of the learner, as the command reads them."""

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
PAGE_BYTES = 4 << 20

Scrape = Mapping[str, float]
"""Samples of a /metrics page by name and labels, sorted by label: ``treegrpo_budget_spent_total/tokens/train``."""
Read = Callable[[str], Awaitable[Scrape]]
"""The samples of the page at an address; none while it does not answer, for who reads can do without."""


def parse_scrape(text: str) -> Scrape:
    """The samples of a /metrics page."""
    return {
        "/".join((sample.name, *(value for _, value in sorted(sample.labels.items())))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _samples(page: HttpResponse) -> Scrape:
    try:
        return parse_scrape(page.text) if page.ok else {}
    except (ValueError, IndexError):  # the parser has no error of its own
        return {}


@asynccontextmanager
async def pages(access: Credentials) -> AsyncGenerator[Read]:
    """Read pages for the time of the block."""
    scheme = "http" if access.keys is None else "https"
    async with HttpClient(verify=access.web_context(Role.LEARNER), headers=bearer_header(access.metrics_token)) as client:

        async def read(address: str) -> Scrape:
            url = f"{scheme}://{reachable_address(address)}/metrics"
            try:
                return await client.request("GET", url, _samples, seconds=SCRAPE_SECONDS, size=PAGE_BYTES)
            except (UnavailableError, DeadlineError, ContractError):
                return {}

        yield read
