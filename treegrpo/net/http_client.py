"""HTTP client of every service that asks a web server: the retriever, SGLang, /metrics pages.

    request ─► connection slot ─► connect ─► head ─► chunks of the body ─► decompressed ─► parsed by the caller
               └────────────── one deadline for all of it, one size limit for the body ──────────────┘

| fault | error |
|---|---|
| cannot be reached, breaks off, speaks no HTTP | UnavailableError |
| not complete in time | DeadlineError |
| too large, compressed in another way, a redirect to another server | ContractError |
| a URL or header that cannot be sent | ConfigError |

Nothing of the process's surroundings counts: no proxy, no .netrc, no cookie. A status is the caller's to judge.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import httpcore
import httpx

from treegrpo.errors import ConfigError, ContractError, DeadlineError, UnavailableError, describe
from treegrpo.net.limits import ANSWER_BYTES, JSON_PARTS, LARGE_ANSWERS, LARGE_BYTES, LOOP_BYTES

REDIRECTS = 3
SHOWN_CHARACTERS = 200
"""Of an answer, in a sentence about it."""
_SLICE = 64 << 10
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_COMPRESSED = ("gzip", "x-gzip", "deflate")
T = TypeVar("T")
cast(
    "Any", httpcore.AsyncHTTP11Connection
).READ_NUM_BYTES = 4096  # taken apart without a pause: 64 KiB of chunks of a byte take a second


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A complete response."""

    url: str
    """Where it came from, as it may be shown."""
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        """The body as UTF-8; invalid bytes are replaced."""
        return self.body.decode(errors="replace")

    @property
    def summary(self) -> str:
        """The type and the beginning of the body in one line, for an error message."""
        text = " ".join(self.body[: 4 * SHOWN_CHARACTERS].decode(errors="replace").split())[:SHOWN_CHARACTERS]
        kind = self.headers.get("content-type", "").partition(";")[0][:SHOWN_CHARACTERS]
        return f"{kind or 'no type'}: {text or 'an empty body'}"


class StreamedResponse:
    """A response whose body is not read yet."""

    def __init__(
        self, server: str, url: str, response: httpx.Response, size: int, places: asyncio.Semaphore, stack: AsyncExitStack
    ) -> None:
        self._server = server
        self.url = url
        self.status = response.status_code
        self.headers = response.headers
        self._response = response
        self._size = size
        self._places = places
        self._stack = stack

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    async def read_body(self) -> HttpResponse:
        """The response with its body, decompressed. Raises ContractError if it is larger than allowed."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._size):
            raise self._too_large()
        body, large = bytearray(), False
        async for piece in self._response.aiter_raw():
            body += piece
            if len(body) > self._size:
                raise self._too_large()
            if len(body) > LARGE_BYTES and not large:
                large = await self._place()
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding in {"", "identity"}:
            return HttpResponse(self.url, self.status, self.headers, bytes(body))
        if not large:
            await self._place()
        return HttpResponse(self.url, self.status, self.headers, await asyncio.to_thread(self._inflated, bytes(body), encoding))

    async def iter_lines(self) -> AsyncGenerator[bytes]:
        """The lines of an event stream as they arrive, each no larger than a whole response may be.

        httpx would also end a line at U+0085 and U+2028, which a policy may sample.
        """
        if self.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            raise ContractError(f"The {self._server} compresses an event stream, which was not requested.")
        line = bytearray()
        async for piece in self._response.aiter_raw():
            *ends, rest = piece.split(b"\n")
            for end in ends:
                line += end
                yield bytes(line)
                line.clear()
            line += rest
            if len(line) > self._size:
                raise self._too_large()
        yield bytes(line)

    async def _place(self) -> bool:
        """Wait until fewer than LARGE_ANSWERS large responses are being read; count this one until it is done."""
        await self._stack.enter_async_context(self._places)
        return True

    def _inflated(self, body: bytes, encoding: str) -> bytes:
        if encoding not in _COMPRESSED:
            raise ContractError(f"The {self._server} compresses its answer with {encoding[:64]!r}, which was not requested.")
        stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, whichever the head says
        try:
            plain = stream.decompress(body, self._size + 1)
        except zlib.error as error:
            raise ContractError(f"The answer of the {self._server} is no {encoding} data ({describe(error)}).") from error
        if len(plain) > self._size:
            raise self._too_large()
        if not stream.eof:
            raise ContractError(f"The compressed answer of the {self._server} is cut off.")
        return plain

    def _too_large(self) -> ContractError:
        return ContractError(f"The {self._server} answers with more than {self._size} bytes.")


class HttpClient:
    """HTTP client with a deadline and a size limit for each complete response.

    Example:
        async with HttpClient() as client:
            page = await client.request("GET", "http://127.0.0.1:9400/metrics", lambda answer: answer.text, seconds=1.0)
    """

    def __init__(
        self,
        *,
        name: str = "server",
        verify: ssl.SSLContext | bool = True,
        headers: Mapping[str, str] | None = None,
        connections: int | None = None,
        idle_seconds: float = 5.0,
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            name: what a server that it asks is called in a sentence.
            verify: what an HTTPS server's certificate is checked with; True: public authorities.
            headers: sent with each request, like a token.
            connections: requests at once; more wait, and that counts in their deadlines. None: as many as there are.
            idle_seconds: a connection is kept for so long for the next request.
        """
        self._name = name
        self._places = asyncio.Semaphore(LARGE_ANSWERS)
        self._client = httpx.AsyncClient(
            timeout=None,  # noqa: S113 - each request has a deadline for the whole
            verify=verify,
            headers={"Accept-Encoding": "identity", **(headers or {})},
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=None, keepalive_expiry=idle_seconds),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def request(
        self,
        method: str,
        url: str,
        read: Callable[[HttpResponse], T],
        *,
        seconds: float,
        body: Any = None,
        size: int = ANSWER_BYTES,
    ) -> T:
        """Send a request and return what ``read`` makes of the response; it runs in a thread when the response is large.

        Args:
            method: GET or POST.
            url: of the whole resource.
            read: parses the response, of any status.
            seconds: from now to the end of ``read``.
            body: sent as JSON unless None.
            size: bytes of the body, as it is sent and decompressed.

        Raises:
            UnavailableError, DeadlineError, ContractError, ConfigError: as the module says. ``read``'s own.
        """
        async with self.stream(method, url, seconds=seconds, body=body, size=size) as reply:
            answer = await reply.read_body()
            return await asyncio.to_thread(read, answer) if len(answer.body) > LOOP_BYTES else read(answer)

    @asynccontextmanager
    async def stream(
        self, method: str, url: str, *, seconds: float, body: Any = None, size: int = ANSWER_BYTES
    ) -> AsyncGenerator[StreamedResponse]:
        """Stream a response; the block has to end within ``seconds``. Arguments and errors as `request`."""
        shown = public_url(url)
        server = f"{self._name} at {shown}"
        async with _failures(server, seconds), AsyncExitStack() as stack:
            response = await self._sent(stack, self._request(method, url, body), server)
            yield StreamedResponse(server, shown, response, size, self._places, stack)

    def _request(self, method: str, url: str, body: Any) -> httpx.Request:
        if body is None:
            return self._client.build_request(method, url)
        content = json.dumps(body).encode()  # httpx would not send half a character, which JSON can spell
        return self._client.build_request(method, url, content=content, headers={"Content-Type": "application/json"})

    async def _sent(self, stack: AsyncExitStack, request: httpx.Request, server: str) -> httpx.Response:
        """Send the request and return the head of the response, after redirects within the same server."""
        origin, method = _origin(request.url), request.method
        for _ in range(REDIRECTS + 1):
            response = await self._client.send(request, stream=True)
            stack.push_async_callback(response.aclose)
            following = response.next_request
            if following is None:
                return response
            if _origin(following.url) != origin or following.method != method:
                where = public_url(str(following.url))
                raise ContractError(f"The {server} redirects to {where}, which is not followed; set that URL.")
            await response.aclose()  # its connection is one of those that the client may have
            request = following
        raise ContractError(f"The {server} redirects more than {REDIRECTS} times; set the final URL.")


@asynccontextmanager
async def _failures(server: str, seconds: float) -> AsyncGenerator[None]:
    """Translate time-outs and errors of httpx to ours."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError as error:
        if not scope.expired():  # the caller's own
            raise
        raise DeadlineError(f"The {server} did not answer within {seconds:g} s.") from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
        raise ConfigError(f"The {server} cannot be reached ({describe(error)}).") from error
    except httpx.HTTPError as error:
        raise UnavailableError(f"The {server} does not answer ({describe(error)}).") from error


def public_url(url: str) -> str:
    """``url`` for a log or message: without user, password, query and fragment, any of which may be a secret."""
    address, _, _ = url.partition("#")
    address, _, _ = address.partition("?")
    scheme, mark, rest = address.rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def read_json(body: bytes) -> Any:
    """Parse a JSON text from a peer.

    Raises:
        ValueError: it is not JSON, or has more than JSON_PARTS values.
    """
    if len(body) > JSON_PARTS and _more_parts(body, JSON_PARTS):
        raise ValueError(f"it has more than {JSON_PARTS} values")
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _more_parts(body: bytes, most: int) -> bool:
    """Whether a JSON text has more than ``most`` values and brackets outside its strings; linear, and in short calls."""
    parts, inside, escape = 0, False, b""
    for start in range(0, len(body), _SLICE):
        piece = _ESCAPED.sub(b"", escape + body[start : start + _SLICE])
        escape = b"\\" if piece.endswith(b"\\") else b""
        texts = piece.split(b'"')
        parts += sum(text.count(mark) for text in texts[inside::2] for mark in (b",", b"[", b"{"))
        inside ^= len(texts) % 2 == 0
        if parts > most:
            return True
    return False


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
