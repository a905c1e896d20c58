"""HTTP client of one SGLang server: each call has a deadline and a size limit, each failure an error type of ours.

connection refused, reset, cut off      UnavailableError
no response in time                     DeadlineError
an invalid response                     ContractError
an error response                       EngineError, for weights WeightsError
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.sampler.engines.sglang.server.responses import (
    ForeignVersionError,
    GenerateResponse,
    ServedModel,
    ServerInfo,
    ServerLoad,
    parse_generate_response,
    parse_load,
    parse_model_info,
    parse_server_info,
)
from services.sampler.engines.sglang.server.timings import TIMINGS, SGLangTimings
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import (
    ConfigError,
    ContractError,
    DeadlineError,
    EngineError,
    TreeGrpoError,
    UnavailableError,
    WeightsError,
    describe,
)
from treegrpo.net.http_client import HttpClient, HttpResponse, read_json

IDLE_SECONDS = 2.0
"""Idle connections are closed before the server closes them, which it does after five."""
CONTROL_BYTES = 4 << 20
"""The largest response but for completions and metrics."""
METRICS_BYTES = 16 << 20
COMPLETION_BYTES, TOKEN_BYTES = 1 << 20, 1 << 10
"""The largest response with a completion, and more for each token that it may have: its number, its log-probability, its
text."""
MESSAGE_CHARACTERS = 300
"""Of a server's error message that are quoted."""
METRIC_PREFIX = "sglang:"
"""How the names of SGLang's own metrics begin; the others are of its Python."""
EVENT, END = b"data: ", b"[DONE]"
NO_INTERVAL = 1 << 30
"""Tokens from one event to the next: more than there are."""

T = TypeVar("T")


class SGLangClient:
    """The calls to the server at ``url``."""

    def __init__(self, url: str, verify: ssl.SSLContext | bool = True, timings: SGLangTimings = TIMINGS) -> None:
        """``verify``: what HTTPS servers are verified with."""
        self.url = url.rstrip("/")
        self._timings = timings
        self._client = HttpClient(name="SGLang server", verify=verify, idle_seconds=IDLE_SECONDS)

    async def close_connections(self) -> None:
        await self._client.close()

    async def generate(self, body: dict[str, Any], on_first_token: Callable[[], None] | None = None) -> GenerateResponse:
        """Sample one completion; ``on_first_token`` is called when its first token arrived, hence its prefix was computed."""
        if on_first_token is None:
            response = await self._call("POST", "/generate", body, self._timings.generate, _max_bytes(body))
        else:
            response = await self._stream("/generate", body, on_first_token)
        max_tokens = body["sampling_params"]["max_new_tokens"]
        return self._parse(lambda: parse_generate_response(response, max_tokens), "/generate")

    async def abort_request(self, rid: str) -> None:
        """Abort a request. That the server is lost, and the request with it, is no error."""
        with suppress(TreeGrpoError):
            await self._call("POST", "/abort_request", {"rid": rid}, self._timings.control)

    async def get_load(self) -> ServerLoad:
        """How busy it is."""
        body = await self._call("GET", "/v1/loads?include=core", None, self._timings.control)
        return self._parse(lambda: parse_load(body), "/v1/loads")

    async def get_metrics(self) -> list[Metric]:
        """Its Prometheus metrics; none where others started it without ``--enable-metrics``."""
        async with self._translate_errors("/metrics", self._timings.control):
            return await self._client.request(
                "GET", f"{self.url}/metrics/", self._read_metrics, seconds=self._timings.control, size=METRICS_BYTES
            )

    def _read_metrics(self, page: HttpResponse) -> list[Metric]:
        if page.status == HTTPStatus.NOT_FOUND:
            return []
        if not page.ok:
            raise self._error_response("/metrics", page)
        try:
            return _parse_metrics(page.text)
        except (ValueError, IndexError) as error:  # the parser has no error of its own
            raise ContractError(
                f"The response of the server at {self.url} to /metrics is not a metrics page: {describe(error)}."
            ) from error

    async def get_server_info(self) -> ServerInfo:
        """Its version, and what it was started with."""
        body = await self._call("GET", "/server_info", None, self._timings.control)
        return self._parse(lambda: parse_server_info(body), "/server_info")

    async def get_model_info(self) -> ServedModel:
        """The model that it serves."""
        body = await self._call("GET", "/model_info", None, self._timings.control)
        return self._parse(lambda: parse_model_info(body), "/model_info")

    async def check_health(self) -> None:
        """Return if it can generate."""
        await self._call("GET", "/health", None, self._timings.health)

    async def pause_generation(self) -> None:
        """Retract running requests to its queue and start none; their keys and values are dropped."""
        await self._call("POST", "/pause_generation", {"mode": "retract"}, self._timings.control)

    async def resume_generation(self) -> None:
        """End a pause; a server that is not paused takes it, too."""
        await self._call("POST", "/continue_generation", {"torch_empty_cache": False}, self._timings.control)

    async def update_weights(self, version: PolicyVersion, path: Path) -> None:
        """Read the weights in ``path`` and drop all keys and values; call it between `pause_generation` and `resume_generation`.

        Raises:
            WeightsError: the server refused them, with its message. What it serves now is not known.
        """
        # Without abort_all_requests = false a server may end the very requests that the pause has kept.
        body = {"model_path": str(path), "weight_version": str(version), "flush_cache": True, "abort_all_requests": False}
        try:
            answer = await self._call("POST", "/update_weights_from_disk", body, self._timings.update)
        except EngineError as error:
            raise WeightsError(f"The weights of version {version} were refused: {error}") from error
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise WeightsError(
                f"The SGLang server at {self.url} does not confirm version {version}; its response is {_short(str(answer))}"
            )

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, seconds: float, size: int = CONTROL_BYTES) -> Any:
        async with self._translate_errors(path, seconds):
            read = partial(self._read_body, path)
            return await self._client.request(method, self.url + path, read, seconds=seconds, body=body, size=size)

    def _read_body(self, path: str, response: HttpResponse) -> Any:
        if not response.ok:
            raise self._error_response(path, response)
        return self._parse(lambda: read_json(response.body), path) if response.body else None

    async def _stream(self, path: str, body: dict[str, Any], on_first_token: Callable[[], None]) -> Any:
        """The last event of a streamed response. The first token is one event, the next is the end."""
        streamed = {**body, "stream": True, "sampling_params": {**body["sampling_params"], "stream_interval": NO_INTERVAL}}
        request = self._client.stream(
            "POST", self.url + path, seconds=self._timings.generate, body=streamed, size=_max_bytes(body)
        )
        last = b""
        async with self._translate_errors(path, self._timings.generate), request as reply:
            if not reply.ok:
                raise self._error_response(path, await reply.read_body())
            async for line in reply.iter_lines():
                if line.startswith(EVENT) and not line.endswith(END):
                    last = line.removeprefix(EVENT)
                    on_first_token()
        answer = self._parse(lambda: read_json(last), path)
        if isinstance(answer, dict) and "error" in answer:
            raise EngineError(f"The SGLang server at {self.url} answers {path} with an error: {_message(answer)}")
        return answer

    @asynccontextmanager
    async def _translate_errors(self, path: str, seconds: float) -> AsyncGenerator[None]:
        """Name server and path in errors of the connection."""
        try:
            yield
        except DeadlineError as error:
            raise DeadlineError(f"The SGLang server at {self.url} did not answer {path} within {seconds:.0f} s.") from error
        except (UnavailableError, ConfigError) as error:
            message = describe(error.__cause__ or error)
            raise UnavailableError(f"The SGLang server at {self.url} cannot be reached ({message}).") from error

    def _error_response(self, path: str, answer: HttpResponse) -> EngineError:
        try:
            message = _message(read_json(answer.body))
        except ValueError:
            message = _short(answer.text)
        return EngineError(f"The SGLang server at {self.url} answers {path} with {answer.status}: {message}")

    def _parse(self, parse: Callable[[], T], path: str) -> T:
        try:
            return parse()
        except (ContractError, ValueError) as error:  # the second of JSON: none, too long a number, too deep
            kind = ForeignVersionError if isinstance(error, ForeignVersionError) else ContractError
            raise kind(f"The response of the server at {self.url} to {path} is invalid: {describe(error)}.") from error


def _max_bytes(body: dict[str, Any]) -> int:
    """The largest response to a request for a completion."""
    return COMPLETION_BYTES + TOKEN_BYTES * int(body["sampling_params"]["max_new_tokens"])


def _parse_metrics(page: str) -> list[Metric]:
    """SGLang's own metrics on a page. Raises ValueError or IndexError if it is not a page of metrics."""
    return [family for family in text_string_to_metric_families(page) if family.name.startswith(METRIC_PREFIX)]


def _message(body: Any) -> str:
    """The message in an error response."""
    found = body.get("message") or body.get("error") or body if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message", found)
    return _short(str(found))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_CHARACTERS else text[:MESSAGE_CHARACTERS] + " …"
