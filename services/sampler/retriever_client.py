"""Opens the client of the retriever that the configuration names, for checks and for use."""

from __future__ import annotations

from services.environments.retrieval import HttpRetriever
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError
from treegrpo.net.limits import TOPK
from treegrpo.security.credentials import Credentials, bearer_header


def check_topk(config: Config) -> str:
    """Check that our retriever returns environment.topk documents for one query. Raises ConfigError.

    Another retriever may return more: `probe_retriever` asks it.
    """
    topk = config.environment.topk
    if topk > TOPK and not config.retriever.url:
        raise ConfigError(
            f"environment.topk = {topk} is more than the {TOPK} documents that `treegrpo retriever` returns for one query; "
            "lower it, or set retriever.url to a server that returns more."
        )
    return f"{topk} documents for a query"


def open_retriever(config: Config, access: Credentials) -> HttpRetriever:
    """Open the client of the run's retriever; close it after use.

    Raises:
        ConfigError: others could read the queries, or our own retriever returns no such number of documents.
    """
    check_topk(config)
    access.check_url("retriever.url", config.search_url)
    headers = bearer_header(access.retriever_token)
    return HttpRetriever(
        config.search_url, config.environment.timeout, verify=access.web_context(Role.RETRIEVER), headers=headers
    )
