"""One SGLang server over HTTP: every call has a deadline and a size for its whole answer, every failure one of our types.

connection refused, reset, cut off      UnavailableError
no answer in time                       DeadlineError
an answer that is none                  ContractError
an answer that says no                  EngineError, for weights WeightsError
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.sampler.engines.sglang.api.responses import (
    Answer,
    ForeignVersionError,
    Info,
    Load,
    Model,
    read_answer,
    read_info,
    read_load,
    read_model,
)
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

GENERATE_SECONDS = 300.0
"""The longest one completion may take; a request that takes longer is given up and made again."""
CONTROL_SECONDS = 10.0
HEALTH_SECONDS = 30.0
"""The server itself waits 20 for its scheduler."""
UPDATE_SECONDS = 300.0
"""The longest a server may take to read new weights."""
IDLE_SECONDS = 2.0
"""Connections are given up before the server does so, which it does after five."""
CONTROL_BYTES = 4 << 20
"""The largest answer to what is no completion."""
METRICS_BYTES = 16 << 20
COMPLETION_BYTES, TOKEN_BYTES = 1 << 20, 1 << 10
"""The largest answer to a request for a completion, and more for each token that it may have: its number, its
log-probability, its text."""
SAID_CHARACTERS = 300
OWN = "sglang:"
"""How the names of its metrics begin; the others are of its Python."""
EVENT, END = b"data: ", b"[DONE]"
NEVER = 1 << 30
"""Tokens from one event to the next."""


class Api:
    """The calls this project makes to the server at ``url``."""

    def __init__(self, url: str, verify: ssl.SSLContext | bool = True) -> None:
        """``verify``: what HTTPS servers are verified with."""
        self.url = url.rstrip("/")
        self._client = HttpClient(name="SGLang server", verify=verify, idle_seconds=IDLE_SECONDS)

    async def close(self) -> None:
        await self._client.close()

    async def generate(self, body: dict[str, Any], started: Callable[[], None] | None = None) -> Answer:
        """Sample one completion; ``started`` is called when its first token is there, hence its prefix computed."""
        if started is None:
            answer = await self._call("POST", "/generate", body, GENERATE_SECONDS, _size(body))
        else:
            answer = await self._stream("/generate", body, started)
        return self._read(lambda: read_answer(answer, body["sampling_params"]["max_new_tokens"]), "/generate")

    async def abort(self, rid: str) -> None:
        """End a request. That the server is gone, and the request with it, is no error."""
        with suppress(TreeGrpoError):
            await self._call("POST", "/abort_request", {"rid": rid}, CONTROL_SECONDS)

    async def load(self) -> Load:
        """How busy it is."""
        body = await self._call("GET", "/v1/loads?include=core", None, CONTROL_SECONDS)
        return self._read(lambda: read_load(body), "/v1/loads")

    async def metrics(self) -> list[Metric]:
        """What it says of itself to Prometheus; nothing where others started it without ``--enable-metrics``."""
        async with self._failing("/metrics", CONTROL_SECONDS):
            return await self._client.request(
                "GET", f"{self.url}/metrics/", self._families, seconds=CONTROL_SECONDS, size=METRICS_BYTES
            )

    def _families(self, page: HttpResponse) -> list[Metric]:
        if page.status == HTTPStatus.NOT_FOUND:
            return []
        if not page.ok:
            raise self._refusal("/metrics", page)
        try:
            return _families(page.text)
        except (ValueError, IndexError) as error:  # the parser has no error of its own
            raise ContractError(
                f"What the server at {self.url} answers to /metrics is no page of metrics: {describe(error)}."
            ) from error

    async def info(self) -> Info:
        """What it is and was started with."""
        body = await self._call("GET", "/server_info", None, CONTROL_SECONDS)
        return self._read(lambda: read_info(body), "/server_info")

    async def model(self) -> Model:
        """What it serves."""
        body = await self._call("GET", "/model_info", None, CONTROL_SECONDS)
        return self._read(lambda: read_model(body), "/model_info")

    async def health(self) -> None:
        """Return if it can generate."""
        await self._call("GET", "/health", None, HEALTH_SECONDS)

    async def pause(self) -> None:
        """Send running requests back to its queue and begin none; their keys and values are forgotten."""
        await self._call("POST", "/pause_generation", {"mode": "retract"}, CONTROL_SECONDS)

    async def resume(self) -> None:
        """The opposite of `pause`; of a server that runs, too."""
        await self._call("POST", "/continue_generation", {"torch_empty_cache": False}, CONTROL_SECONDS)

    async def update(self, version: PolicyVersion, path: Path) -> None:
        """Read the weights in ``path`` and forget every key and value; call it between `pause` and `resume`.

        Raises:
            WeightsError: the server refused them, with its words. What it serves now is not known.
        """
        # Without abort_all_requests = false a server may end the very requests that the pause has kept.
        body = {"model_path": str(path), "weight_version": str(version), "flush_cache": True, "abort_all_requests": False}
        try:
            answer = await self._call("POST", "/update_weights_from_disk", body, UPDATE_SECONDS)
        except EngineError as error:
            raise WeightsError(f"The weights of version {version} were refused: {error}") from error
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise WeightsError(
                f"The SGLang server at {self.url} does not confirm version {version}; it says {_short(str(answer))}"
            )

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, seconds: float, size: int = CONTROL_BYTES) -> Any:
        async with self._failing(path, seconds):
            read = partial(self._value, path)
            return await self._client.request(method, self.url + path, read, seconds=seconds, body=body, size=size)

    def _value(self, path: str, answer: HttpResponse) -> Any:
        if not answer.ok:
            raise self._refusal(path, answer)
        return self._read(lambda: read_json(answer.body), path) if answer.body else None

    async def _stream(self, path: str, body: dict[str, Any], started: Callable[[], None]) -> Any:
        """The last of the events that a request leads to. The first token is one, the next is the end."""
        streamed = {**body, "stream": True, "sampling_params": {**body["sampling_params"], "stream_interval": NEVER}}
        asking = self._client.stream("POST", self.url + path, seconds=GENERATE_SECONDS, body=streamed, size=_size(body))
        last = b""
        async with self._failing(path, GENERATE_SECONDS), asking as reply:
            if not reply.ok:
                raise self._refusal(path, await reply.read_body())
            async for line in reply.iter_lines():
                if line.startswith(EVENT) and not line.endswith(END):
                    last = line.removeprefix(EVENT)
                    started()
        answer = self._read(lambda: read_json(last), path)
        if isinstance(answer, dict) and "error" in answer:
            raise EngineError(f"The SGLang server at {self.url} answers {path} with an error: {_message(answer)}")
        return answer

    @asynccontextmanager
    async def _failing(self, path: str, seconds: float) -> AsyncGenerator[None]:
        """Failures of the connection with the path that was asked for."""
        try:
            yield
        except DeadlineError as error:
            raise DeadlineError(f"The SGLang server at {self.url} did not answer {path} within {seconds:.0f} s.") from error
        except (UnavailableError, ConfigError) as error:
            said = describe(error.__cause__ or error)
            raise UnavailableError(f"The SGLang server at {self.url} cannot be reached ({said}).") from error

    def _refusal(self, path: str, answer: HttpResponse) -> EngineError:
        try:
            said = _message(read_json(answer.body))
        except ValueError:
            said = _short(answer.text)
        return EngineError(f"The SGLang server at {self.url} answers {path} with {answer.status}: {said}")

    def _read(self, read: Any, path: str) -> Any:
        try:
            return read()
        except (ContractError, ValueError) as error:  # the second of JSON: none, too long a number, too deep
            kind = ForeignVersionError if isinstance(error, ForeignVersionError) else ContractError
            raise kind(f"What the server at {self.url} answers to {path} is of no use: {describe(error)}.") from error


def _size(body: dict[str, Any]) -> int:
    """Bytes of the answer to a request for a completion."""
    return COMPLETION_BYTES + TOKEN_BYTES * int(body["sampling_params"]["max_new_tokens"])


def _families(page: str) -> list[Metric]:
    """SGLang's own metrics on a page, which may be long. Raises ValueError or IndexError when it is none."""
    return [family for family in text_string_to_metric_families(page) if family.name.startswith(OWN)]


def _message(body: Any) -> str:
    """The message in an error."""
    found = body.get("message") or body.get("error") or body if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message", found)
    return _short(str(found))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAID_CHARACTERS else text[:SAID_CHARACTERS] + " …"
