r"""The search tool as the environment sees it, and its client for Search-R1's HTTP API.

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
"""A query that nobody can take amiss."""
_PATH = "/retrieve"
_PASSING = frozenset((429, 502, 503, 504))
"""Statuses of a server, or of a proxy before it, that restarts or is overloaded."""
_SHOWN_KEYS = 8


class Retriever(Protocol):
    """Whatever finds documents for a query."""

    async def search(self, query: str, topk: int) -> list[str]:
        r"""The contents (``"Title\\ntext"``) of at most ``topk`` documents, best first.

        Raises:
            ToolAwayError: the server is not there.
            ToolError: it refuses this query.
        """
        ...


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
            address: URL of the server, with or without ``/retrieve``.
            deadline: seconds for one query, from connecting to the last byte of the answer.
            verify: what an HTTPS server's certificate is checked with; True: public authorities.
            headers: sent with each request, like a token.
        """
        self._url = retrieve_url(address)
        self._shown = public_url(self._url)
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
            raise ToolAwayError("retriever", self._shown, reason, certain=True) from error
        except DeadlineError as error:
            reason = f"did not answer within {self._deadline:g} s (environment.timeout)"
            raise ToolAwayError("retriever", self._shown, reason, certain=False) from error
        except (ContractError, ConfigError) as error:
            raise ToolError(f"{error} See retriever.url.") from error

    def _read(self, topk: int, answer: HttpResponse) -> list[str]:
        """The documents of an answer. Raises ToolError when it has none to read."""
        if not answer.ok:
            raise self._refused(answer)
        try:
            return [_contents(hit) for hit in _hits(read_json(answer.body))[:topk]]
        except ValueError as error:
            raise ToolError(
                f"the retriever at {self._shown} answered something that is not Search-R1's format: {describe(error)}; it "
                f"begins as {answer.summary}"
            ) from error

    def _refused(self, answer: HttpResponse) -> ToolError:
        """The error for a status that says so: of a server that is not well, or of one that does not like the query."""
        status = answer.status
        if status >= 500 or status in _PASSING or status == 408:
            reason = f"answers with status {status}: {answer.summary}"
            return ToolAwayError("retriever", self._shown, reason, certain=status in _PASSING)
        return ToolError(f"the retriever at {self._shown} refused a query with status {status}: {answer.summary}")


def retrieve_url(address: str) -> str:
    """Where queries go, for a URL with or without ``/retrieve``, a slash at its end, a path or a query.

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
        keys = f"an object of {_names(answer)}" if isinstance(answer, dict) else f"a {type(answer).__name__}"
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
        raise ValueError(f"a document has {_names(document)}, and neither contents nor text")
    title = document.get("title")
    if isinstance(title, str) and title and not ("\n" in text and "contents" in document):
        return f"{title}\n{text}"
    return text


def _names(found: Mapping[str, Any]) -> str:
    names = [repr(name[:32]) for name in found][:_SHOWN_KEYS]
    return ", ".join(names) + (" …" if len(found) > _SHOWN_KEYS else "") if names else "nothing"
