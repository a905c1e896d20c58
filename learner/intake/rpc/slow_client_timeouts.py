"""Ends the calls of a slow client: sending the request and reading each response have a time limit.

gRPC waits without a limit for the one message of a unary call, and for a client that does not read a stream. So every call
is served as one that streams its request, which looks the same on the wire, and its message is read here.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from learner.intake.rpc.refused_calls import RefusedCalls
from treegrpo.net.limits import CHUNK_SECONDS, NAMED_CALLS, REQUEST_SECONDS

EOF: Any = cast("Any", grpc.aio).EOF
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class CallLimits:
    request_seconds: float = REQUEST_SECONDS
    """The one message of a unary call comes within this time."""
    response_seconds: float = CHUNK_SECONDS
    """The client reads each message of a response stream within this time."""
    calls_per_name: int = NAMED_CALLS
    """Calls at once of one sampler, by the name in its certificate."""


class SlowClientTimeouts:
    """Wraps handlers of calls with one request in time limits for each message."""

    def __init__(self, refused_calls: RefusedCalls, limits: CallLimits) -> None:
        self._refused_calls = refused_calls
        self._limits = limits

    def with_timeouts(self, handler: Handler) -> Handler:
        async def serve(_requests: object, context: Context) -> Any:
            request = await self._read_single_request(context)
            if not inspect.isasyncgenfunction(handler):
                return await handler(request, context)
            async with aclosing(handler(request, context)) as responses:
                async for response in responses:
                    await self._write_response(response, context)
            return None

        return serve

    async def _read_single_request(self, context: Context) -> Any:
        seconds = self._limits.request_seconds
        try:
            async with asyncio.timeout(seconds):
                request = await context.read()
        except TimeoutError:
            sentence = f"No request came for {seconds:.0f} s; a unary call sends it at once."
            await self._refused_calls.abort_call(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        except DecodeError:
            request = EOF
        if request == EOF:
            sentence = "The call has no request of this protocol."
            await self._refused_calls.abort_call(context, "message", grpc.StatusCode.INVALID_ARGUMENT, sentence)
        return request

    async def _write_response(self, response: object, context: Context) -> None:
        seconds = self._limits.response_seconds
        try:
            async with asyncio.timeout(seconds):
                await context.write(response)
        except TimeoutError:
            sentence = f"The client read nothing for {seconds:.0f} s; fetch again from the offset where it stopped."
            await self._refused_calls.abort_call(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
