"""The search tool as the environment sees it, and its client for Search-R1's HTTP API."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import httpx
from pydantic import BaseModel, ValidationError

from treegrpo.errors import ToolError


class Retriever(Protocol):
    """Whatever finds documents for a query."""

    async def search(self, query: str, topk: int) -> list[str]:
        r"""The contents (``"Title\\ntext"``) of at most ``topk`` documents, best first.

        Raises:
            ToolError: the search could not be performed.
        """
        ...


class _Document(BaseModel):
    contents: str


class _Hit(BaseModel):
    document: _Document
    score: float


class _Answer(BaseModel):
    result: list[list[_Hit]]


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
            raise ToolError(
                f"the retriever at {self._url} refused a query with status {error.response.status_code}: "
                f"{error.response.text[:200]}"
            ) from error
        except httpx.HTTPError as error:
            raise ToolError(
                f"the retriever at {self._url} does not answer ({type(error).__name__}); is it running there?"
            ) from error
        except (ValidationError, ValueError) as error:
            raise ToolError(f"the retriever at {self._url} answered something that is not Search-R1's format") from error
        return [hit.document.contents for hit in hits]
