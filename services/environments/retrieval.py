"""The search tool as the environment sees it, and its client for Search-R1's HTTP API."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import httpx
from pydantic import BaseModel, ValidationError

from treegrpo.errors import ToolAwayError, ToolError


class Retriever(Protocol):
    """Whatever finds documents for a query."""

    async def search(self, query: str, topk: int) -> list[str]:
        r"""The contents (``"Title\\ntext"``) of at most ``topk`` documents, best first.

        Raises:
            ToolAwayError: the server is not there.
            ToolError: it refuses this query.
        """
        ...


class _Document(BaseModel):
    contents: str


class _Hit(BaseModel):
    document: _Document
    score: float


class _Answer(BaseModel):
    result: list[list[_Hit]]


_PASSING = frozenset((429, 502, 503, 504))
"""Statuses of a server, or of a proxy before it, that restarts or is overloaded."""


class HttpRetriever:
    """Client of a retrieval server that speaks Search-R1's API.

    Example:
        async with HttpRetriever("http://127.0.0.1:8000", deadline=10.0) as retriever:
            documents = await retriever.search("Ghazni", topk=2)
    """

    def __init__(
        self,
        address: str,
        deadline: float,
        *,
        verify: ssl.SSLContext | bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            address: base URL of the server, without ``/retrieve``.
            deadline: seconds for one request, connection included.
            verify: what an HTTPS server's certificate is checked with; True: public authorities.
            headers: sent with each request, like a token.
        """
        self._url = f"{address.rstrip('/')}/retrieve"
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(deadline), verify=verify, headers=headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.aclose()

    async def search(self, query: str, topk: int) -> list[str]:
        """See `Retriever.search`."""
        body = {"queries": [query], "topk": topk, "return_scores": True}
        try:
            response = await self._client.post(self._url, json=body)
            response.raise_for_status()
            (hits,) = _Answer.model_validate_json(response.content).result
        except httpx.HTTPStatusError as error:
            raise self._refused(error.response) from error
        except (httpx.DecodingError, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise ToolError(f"the retriever at {self._url} cannot be asked ({_said(error)}); see retriever.url.") from error
        except httpx.HTTPError as error:
            certain = not isinstance(error, httpx.ReadTimeout)
            raise ToolAwayError("retriever", self._url, f"does not answer ({_said(error)})", certain=certain) from error
        except (ValidationError, ValueError) as error:
            raise ToolError(f"the retriever at {self._url} answered something that is not Search-R1's format") from error
        return [hit.document.contents for hit in hits]

    def _refused(self, response: httpx.Response) -> ToolError:
        """The error for a status that says so: of a server that is not well, or of one that does not like the query."""
        status, said = response.status_code, response.text[:200]
        if status >= 500 or status in _PASSING or status == 408:
            return ToolAwayError("retriever", self._url, f"answers with status {status}: {said}", certain=status in _PASSING)
        return ToolError(f"the retriever at {self._url} refused a query with status {status}: {said}")


def _said(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
