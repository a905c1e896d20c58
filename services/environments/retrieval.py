r"""The search tool's interface, and its client for Search-R1's HTTP API.

    POST URL/retrieve  {"queries": [query], "topk": k, "return_scores": true}
    → {"result": [[hit, …]]}

| a hit | is read as |
|---|---|
| `{"document": D, "score": s}` | D; the score does not count, so it may be null or missing |
| D alone, as without `return_scores` | D |

| D | becomes |
|---|---|
| `{"contents": "Title\ntext"}` | that; a `title` beside it goes first if it has no line feed |
| `{"title": "Title", "text": "text"}`, or `content` | `"Title\ntext"` |
| `"Title\ntext"` | that |
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlsplit, urlunsplit

from treegrpo.errors import ConfigError, ContractError, DeadlineError, ToolAwayError, ToolError, UnavailableError, describe
from treegrpo.net.http_client import HttpClient, HttpResponse, public_url, read_json

CONNECTIONS = 128
"""Queries at once; more wait."""
PROBE_QUERY = "anything"
"""A harmless query, for health checks."""
_PATH = "/retrieve"
_TRANSIENT_STATUSES = frozenset((429, 502, 503, 504))
"""HTTP statuses of a server, or of a proxy before it, that restarts or is overloaded."""
_MAX_NAMES = 8


class Retriever(Protocol):
    """Finds documents for a query."""

    async def search(self, query: str, topk: int) -> list[str]:
        r"""Return the contents (``"Title\\ntext"``) of at most ``topk`` documents, best first.

        Raises:
            ToolAwayError: the server is unavailable.
            ToolError: it refuses this query.
        """
        ...


class HttpRetriever:
    """Client of a retrieval server with Search-R1's API.

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
            address: URL of the server, with or without ``/retrieve``.
            deadline: seconds for one query, from connecting to the last byte of the response.
            verify: how an HTTPS server's certificate is checked; True: by public authorities.
            headers: sent with each request, such as a token.
        """
        self._url = retrieve_url(address)
        self._public_url = public_url(self._url)
        self._deadline = deadline
        self._client = HttpClient(name="retriever", verify=verify, headers=headers, connections=CONNECTIONS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.close()

    async def search(self, query: str, topk: int) -> list[str]:
        """See `Retriever.search`."""
        body = {"queries": [query], "topk": topk, "return_scores": True}
        try:
            return await self._client.request("POST", self._url, partial(self._read, topk), seconds=self._deadline, body=body)
        except UnavailableError as error:
            reason = f"does not answer ({describe(error.__cause__ or error)})"
            raise ToolAwayError("retriever", self._public_url, reason, certain=True) from error
        except DeadlineError as error:
            reason = f"did not answer within {self._deadline:g} s (environment.timeout)"
            raise ToolAwayError("retriever", self._public_url, reason, certain=False) from error
        except (ContractError, ConfigError) as error:
            raise ToolError(f"{error} See retriever.url.") from error

    def _read(self, topk: int, answer: HttpResponse) -> list[str]:
        """Read the documents of a response. Raises ToolError when it has another format."""
        if not answer.ok:
            raise self._status_error(answer)
        try:
            return [_contents(hit) for hit in _hits(read_json(answer.body))[:topk]]
        except ValueError as error:
            raise ToolError(
                f"the retriever at {self._public_url} answered something that is not Search-R1's format: {describe(error)}; it "
                f"begins as {answer.summary}"
            ) from error

    def _status_error(self, answer: HttpResponse) -> ToolError:
        """The error for a status: the server is unavailable, or it refuses the query."""
        status = answer.status
        if status >= 500 or status in _TRANSIENT_STATUSES or status == 408:
            reason = f"answers with status {status}: {answer.summary}"
            return ToolAwayError("retriever", self._public_url, reason, certain=status in _TRANSIENT_STATUSES)
        return ToolError(f"the retriever at {self._public_url} refused a query with status {status}: {answer.summary}")


def retrieve_url(address: str) -> str:
    """The URL that queries go to, from one with or without ``/retrieve``, a trailing slash, a path or a query string.

    Example:
        >>> retrieve_url("http://127.0.0.1:8000/")
        'http://127.0.0.1:8000/retrieve'
    """
    parts = urlsplit(address.strip())
    path = parts.path.rstrip("/").removesuffix(_PATH) + _PATH
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _hits(answer: Any) -> list[Any]:
    """The hits of the one query that was asked. Raises ValueError."""
    if not isinstance(answer, dict) or not isinstance(answer.get("result"), list):
        keys = f"an object of {_key_names(answer)}" if isinstance(answer, dict) else f"a {type(answer).__name__}"
        raise ValueError(f'it is {keys}, not an object with a list under "result"')  # noqa: TRY004 - of JSON, not of code
    result = answer["result"]
    if len(result) != 1 or not isinstance(result[0], list):
        raise ValueError(f'"result" has {len(result)} entries for one query, and has to have a list of hits for each query')
    return result[0]


def _contents(hit: Any) -> str:
    """The text of a hit, its title first. Raises ValueError when it has none."""
    document = hit.get("document", hit) if isinstance(hit, dict) else hit
    if isinstance(document, str):
        return document
    if not isinstance(document, dict):
        raise ValueError(f"a document is a {type(document).__name__}")  # noqa: TRY004 - of JSON, not of code
    text = next((document[key] for key in ("contents", "text", "content") if isinstance(document.get(key), str)), None)
    if text is None:
        raise ValueError(f"a document has {_key_names(document)}, and neither contents nor text")
    title = document.get("title")
    if isinstance(title, str) and title and not ("\n" in text and "contents" in document):
        return f"{title}\n{text}"
    return text


def _key_names(found: Mapping[str, Any]) -> str:
    names = [repr(name[:32]) for name in found][:_MAX_NAMES]
    return ", ".join(names) + (" …" if len(found) > _MAX_NAMES else "") if names else "nothing"
